"""QuantExperts: the experts of one layer, packed; on a GPU as stacks that one grouped product runs through.

Experts one after the other cost a wait for the device (which experts have tokens?) and a handful of small kernels
each. Where all of them are fragments of one grid, they lie in one tensor per layer instead, gate and up side by side,
and two grouped products do the work of all: tokens are sorted by expert, and where each expert's begin is counted, on
the device alone, so that a CUDA graph can hold it. Everything else (a CPU, experts of different schemes, experts left
in 16 bits) runs expert by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.kernels import fragments
from bitwright.kernels.cuda import FragmentWeight
from bitwright.kernels.dispatch import Choice
from bitwright.kernels.fragments import BAND, Fragments
from bitwright.kernels.ops import fragment_experts
from bitwright.kernels.permuted import Permuted
from bitwright.kernels.routing_ops import sort_by_expert
from bitwright.models.experts import UnfusedExperts
from bitwright.nn.linear import QuantLinear
from bitwright.nn.packed import PackedModule
from bitwright.scheme import Scheme

GATE_UP, UP, DOWN = "gate_up", "up", "down"


class QuantExperts(UnfusedExperts):
    """Same forward as the fused experts module of transformers; only experts that tokens were sent to are run.

    Children are those of `UnfusedExperts` ("0", "1", ..., each with its linears by name); any of them may be a
    QuantLinear or an nn.Linear, each with a scheme of its own. After `stack`, where that is possible, they are two
    ExpertStack modules, "gate_up" (or "up") and "down"; else `unstacked` says why not.
    """

    unstacked: str | None = "not asked for"

    @classmethod
    def adopt(cls, unfused: UnfusedExperts) -> QuantExperts:
        """Take over the children of `unfused`; nothing is copied."""
        module = cls.__new__(cls)
        module.__dict__.update(unfused.__dict__)
        return module

    def stack(self) -> None:
        """Move the experts into stacks if they allow it; their own modules are gone then.

        Beside what is held anyway, this takes the memory of the larger stack for a moment.
        """
        upper = [self._up] if self._gate is None else [self._gate, self._up]
        self.unstacked = _refuse(self, [upper, [self._down]])
        if self.unstacked is not None:
            return
        inner = self.linear(0, self._up).out_features
        stacks = {UP if self._gate is None else GATE_UP: self._take(upper), DOWN: self._take([self._down])}
        for e in range(self.num_experts):
            delattr(self, str(e))
        for name, module in stacks.items():
            self.add_module(name, module)
        self._inner = inner
        self._up_at = -(-inner // BAND) * BAND  # where up begins beside gate: both are padded to whole bands

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [M, H], top_k_index [M, k] (num_experts or more: no expert), top_k_weights [M, k] -> [M, H]."""
        if self.unstacked is None:
            return self._grouped(hidden_states, top_k_index, top_k_weights)
        output = torch.zeros_like(hidden_states)
        for e in torch.unique(top_k_index).tolist():  # sorted, so sums run in the order of the fused module
            if e >= self.num_experts:
                continue
            position, token = (e == top_k_index.T).nonzero(as_tuple=True)
            y = self.linear(e, self._down)(self._down_input(e, hidden_states[token]))
            y = y * top_k_weights[token, position, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output

    @property
    def gated_stacks(self) -> tuple[ExpertStack, ExpertStack] | None:
        """(gate and up as one, down) of stacks that give silu(gate) * up side by side, with nothing between."""
        plain = type(self.original.act_fn).__name__ in ("SiLUActivation", "SiLU")
        if self.unstacked is not None or self._gate is None or self._inner != self._up_at or not plain:
            return None
        return self.get_submodule(GATE_UP), self.get_submodule(DOWN)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, " + ("grouped" if self.unstacked is None else "one after the other")

    def _grouped(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """All experts at once. Nothing is read on the host, and every sum has a fixed order."""
        M, k = top_k_index.shape
        down = self.get_submodule(DOWN)
        offsets, tokens, places = sort_by_expert(top_k_index, self.num_experts)  # what has no expert comes last
        x = hidden_states.to(down.packed.dtype)[tokens]
        inner = self._activated(self.get_submodule(UP if self._gate is None else GATE_UP)(x, offsets))
        y = down(inner, offsets)[places].view(M, k, down.packed.fragments.N)
        weighted = y * top_k_weights[..., None]
        # Rows of no expert hold whatever was in memory: replaced, not multiplied by zero.
        weighted.masked_fill_((top_k_index >= self.num_experts)[..., None], 0.0)
        return weighted.sum(dim=1).to(hidden_states.dtype)  # over k in its own order, as the fused module's default

    def _activated(self, y: Tensor) -> Tensor:
        """[T, gate and up] -> [T, I]."""
        if self._gate is None:
            return self.original.act_fn(y)
        gate, up = y[:, : self._inner], y[:, self._up_at :]
        apply_gate = getattr(self.original, "_apply_gate", None)
        if apply_gate is None:
            return self.original.act_fn(gate) * up
        return apply_gate(y if self._inner == self._up_at else torch.cat((gate, up), dim=-1))

    def _take(self, leaves: list[str]) -> ExpertStack:
        """A stack of the linears `leaves` of every expert, side by side; each is dropped when it has been copied."""
        first = [self.linear(0, leaf) for leaf in leaves]
        stack = _empty([linear.packed.fragments for linear in first], self.num_experts)
        scheme, choice = first[0].scheme, first[0].choice
        kernel, dtype = first[0].packed.NAME, first[0].packed.dtype
        del first
        for e in range(self.num_experts):
            band = 0
            for leaf in leaves:
                part = self.linear(e, leaf).packed.fragments
                bands = part.words[0].shape[0]
                for whole, piece in zip(stack.words, part.words, strict=True):
                    whole[e, band : band + bands] = piece
                for whole, piece in ((stack.scale, part.scale), (stack.zero, part.zero)):
                    if whole is not None:
                        whole[e, :, band * BAND : (band + bands) * BAND] = piece
                band += bands
                delattr(self.get_submodule(str(e)), leaf)
        return ExpertStack(StackedWeight(stack, kernel, dtype), scheme, choice, len(leaves))


@dataclass(frozen=True)
class StackedWeight:
    """Fragments of a stack, the kernel that reads them, and the dtype of its activations."""

    fragments: Fragments
    kernel: str
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything held in memory."""
        return self.fragments.tensors

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.fragments.nbytes

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.fragments.scale.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [E, N, K]."""
        return fragments.dequantize(self.fragments, dtype)


class ExpertStack(PackedModule):
    """One matrix of every expert (or two, side by side), and their grouped product."""

    packed: Any  # a StackedWeight

    def __init__(self, packed: StackedWeight, scheme: Scheme, choice: Choice, matrices: int) -> None:
        f = packed.fragments
        weights = f.scale.shape[0] * f.N * f.K
        what = f"one product for {matrices * f.scale.shape[0]} matrices of experts"
        reason = f"{what}; {8 * f.nbytes / weights:.2f} bits per weight in memory"
        super().__init__(packed, scheme, Choice(choice.implementation, reason))
        self._operands = (list(f.words), f.scale, f.zero, f.N, f.bits, f.group_size, packed.kernel)

    def forward(self, x: Tensor, offsets: Tensor, settled: bool = False) -> Tensor:
        """x [T, K] sorted by expert, offsets int32 [E + 1] -> [T, N]; rows from offsets[E] on are unspecified.

        settled: the offsets are those of an earlier call, see `ops.fragment_experts`.
        """
        y: Tensor = fragment_experts(x, offsets, *self._operands, settled)
        return y

    def extra_repr(self) -> str:
        f = self.packed.fragments
        return f"{f.scale.shape[0]} x [{f.N}, {f.K}], {self.scheme}, {self.choice.name}"


def _refuse(experts: QuantExperts, groups: list[list[str]]) -> str | None:
    """None if the linears of each group of leaves are fragments for one kernel and at one scheme, else why not."""
    for leaves in groups:
        first: tuple[Any, ...] | None = None
        for e in range(experts.num_experts):
            for leaf in leaves:
                linear = experts.linear(e, leaf)
                if not isinstance(linear, QuantLinear):
                    return f"{e}.{leaf} is not quantized"
                packed = linear.packed
                if isinstance(packed, Permuted):
                    return f"{e}.{leaf} is stored in an activation order of its own"
                if not isinstance(packed, FragmentWeight):
                    return f"{e}.{leaf} runs as {linear.choice.name}, which has no grouped product"
                if linear.bias is not None:
                    return f"{e}.{leaf} has a bias"
                kind = (linear.scheme, packed.NAME, packed.shape, packed.dtype, packed.fragments.scale.dtype)
                first = first or kind
                if kind != first:
                    return f"{e}.{leaf} is {_text(kind)}, 0.{leaves[0]} {_text(first)}"
    return None


def _text(kind: tuple[Any, ...]) -> str:
    return ", ".join(str(part).removeprefix("torch.") for part in kind)


def _empty(parts: list[Fragments], experts: int) -> Fragments:
    """Room for a stack of `experts` times the weights `parts`, side by side along N, each in whole bands of rows."""
    first, last = parts[0], parts[-1]
    bands = sum(p.words[0].shape[0] for p in parts)
    words = tuple(w.new_empty(experts, bands, *w.shape[1:]) for w in first.words)
    grid = (experts, first.scale.shape[0], bands * BAND)
    zero = None if first.zero is None else first.zero.new_empty(grid)
    N = (bands - last.words[0].shape[0]) * BAND + last.N
    return Fragments(words, first.scale.new_empty(grid), zero, N, first.K, first.bits, first.group_size)
