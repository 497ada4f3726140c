"""Fused expert stacks as ordinary linears.

transformers 5 keeps the experts of a layer in two 3-D parameters and multiplies them with slices or grouped kernels,
so there is no module to hook and no matrix to quantize. `unfuse` swaps the fused module for `UnfusedExperts`, where
every expert is a few nn.Linear modules whose weights are views of the same memory and whose names are those of the
checkpoint (`experts.3.w1`); everything downstream sees linears [N, K] only. `fuse` puts the original back.

The order of calls is fixed and the same for every input: gate and up of expert 0, 1, ..., then down of expert 0, 1,
...; experts without tokens are called with an empty [0, K] input. A caller that waits for one linear after the other
(calibration does) can rely on it, and no expert is skipped in silence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitwright.errors import StructureError
from bitwright.models.discover import ExpertStack


class UnfusedExperts(nn.Module):
    """Same forward as the fused experts module it stands for, one nn.Linear per expert and matrix.

    Children: "0", "1", ... one per expert, each with the linears of that expert under their names on disk.
    """

    def __init__(self, original: nn.Module, stack: ExpertStack) -> None:
        super().__init__()
        # In a tuple, so that the fused module is not registered as a child; `fuse` needs it, and so does its gating.
        self._original = (original,)
        self.num_experts = stack.num_experts
        self._gate = _leaf(stack.gate[0].name) if stack.gate else None
        self._up = _leaf(stack.up[0].name)
        self._down = _leaf(stack.down[0].name)
        upper, lower = original.parameters(recurse=False)
        inner = lower.shape[2]
        for e in range(self.num_experts):
            expert = nn.Module()
            if self._gate is not None:
                expert.add_module(self._gate, _view(upper[e, :inner]))
            expert.add_module(self._up, _view(upper[e, -inner:]))
            expert.add_module(self._down, _view(lower[e]))
            self.add_module(str(e), expert)

    @property
    def original(self) -> nn.Module:
        """The fused module; its parameters are on meta."""
        return self._original[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [M, H], top_k_index [M, k] (an index of num_experts or more means no expert), top_k_weights
        [M, k]; returns [M, H] in the dtype of hidden_states."""
        tokens = []
        inner = []
        for e in range(self.num_experts):
            position, token = (e == top_k_index.T).nonzero(as_tuple=True)
            tokens.append((position, token))
            inner.append(self._down_input(e, hidden_states[token]))
        output = torch.zeros_like(hidden_states)
        for e, (position, token) in enumerate(tokens):
            y = self.linear(e, self._down)(inner[e]) * top_k_weights[token, position, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output

    def linear(self, e: int, leaf: str) -> nn.Module:
        """The linear of expert e with that name on disk (or what replaced it)."""
        return self.get_submodule(f"{e}.{leaf}")

    def _down_input(self, e: int, x: Tensor) -> Tensor:
        """[tokens of e, H] -> [tokens of e, I]; gate and up receive the same tensor object."""
        if self._gate is None:
            return self.original.act_fn(self.linear(e, self._up)(x))
        gate, up = self.linear(e, self._gate)(x), self.linear(e, self._up)(x)
        apply_gate = getattr(self.original, "_apply_gate", None)  # some models clamp or scale there
        return self.original.act_fn(gate) * up if apply_gate is None else apply_gate(torch.cat((gate, up), dim=-1))


def unfuse(block: nn.Module, stack: ExpertStack) -> UnfusedExperts:
    """Swap the fused experts module of `stack` inside `block` for linears over the same memory (meta stays meta).

    The fused module gives up its parameters, so that memory is freed as soon as the linears' weights are replaced.
    Returns the new module; the same one if the stack was unfused before.
    """
    current = block.get_submodule(stack.path)
    if isinstance(current, UnfusedExperts):
        return current
    if type(current).__name__ != stack.class_name:
        raise StructureError(f"{stack.name}: expected a {stack.class_name}, found a {type(current).__name__}")
    experts = UnfusedExperts(current, stack)
    experts.train(current.training)
    for name, p in list(current.named_parameters(recurse=False)):
        setattr(current, name, nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False))
    _replace(block, stack.path, experts)
    return experts


def fuse(block: nn.Module) -> None:
    """Undo `unfuse` everywhere inside `block`: the fused modules return, their parameters on meta, not loaded."""
    for path, module in list(block.named_modules()):
        if isinstance(module, UnfusedExperts):
            _replace(block, path, module.original)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _view(weight: Tensor) -> nn.Linear:
    """An nn.Linear without bias over `weight` [N, K], nothing allocated or copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def _replace(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    block.get_submodule(parent).add_module(name, module)
