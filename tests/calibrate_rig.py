"""A tiny model ready for calibration, and ordinary forwards of its blocks hooked by hand to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from algorithm_oracles import rng
from torch import Tensor, nn

from bitwright.calibrate.capture import Call, Group, block_calls, first_tensor, trace
from bitwright.models.discover import discover
from bitwright.models.experts import unfuse

B, L, BATCHES = 2, 9, 3


@dataclass
class Rig:
    """A tiny model with unfused experts, and its blocks' inputs for a few micro-batches."""

    model: Any
    modules: list[nn.Module]
    blocks: tuple[Any, ...]
    hidden: list[Tensor]
    calls: list[list[Call]]

    def names(self, i: int) -> list[str]:
        prefix = self.blocks[i].name + "."
        return [x.name.removeprefix(prefix) for x in self.blocks[i].all_linears]

    def routed(self, i: int) -> set[str]:
        prefix = self.blocks[i].name + "."
        return {x.name.removeprefix(prefix) for stack in self.blocks[i].experts for x in stack.linears}

    def calls_of(self, i: int) -> list[Call]:
        return [call[i] for call in self.calls]

    def groups(self, i: int) -> list[Group]:
        return trace(self.modules[i], self.hidden[0], self.calls[0][i], self.names(i), self.routed(i))


def rig_of(model: Any, seed: int = 0) -> Rig:
    structure = discover(model)
    modules = [model.get_submodule(block.name) for block in structure.blocks]
    for module, block in zip(modules, structure.blocks, strict=True):
        for stack in block.experts:
            unfuse(module, stack)
    ids = torch.randint(2, 320, (BATCHES, B, L), generator=rng(seed))
    with torch.no_grad():
        passes = [block_calls(model.base_model, modules, batch, wrap_for(model)) for batch in ids]
    return Rig(model, modules, structure.blocks, [h for h, _ in passes], [calls for _, calls in passes])


def wrap_for(model: Any) -> Callable[[Tensor], Any]:
    """Falcon's blocks return a tuple, those of the other families a tensor."""
    return (lambda h: (h, None)) if type(model).__name__.startswith("Falcon") else (lambda h: h)


@torch.no_grad()
def observed(block: nn.Module, hidden: Tensor, call: Call, names: Sequence[str]) -> tuple[Tensor, dict, dict]:
    """An ordinary forward of the block: its output, and the inputs and outputs of the submodules `names`."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def hook(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
            inputs[name], outputs[name] = args[0], output.clone()  # Falcon adds to it in place

        handles.append(block.get_submodule(name).register_forward_hook(hook))
    result = first_tensor(block(hidden, *call.args, **call.kwargs))
    for handle in handles:
        handle.remove()
    return result, inputs, outputs


def no_hooks_left(block: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
