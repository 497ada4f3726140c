"""The parts of a model as frozen values, and their plain description for `bitwright inspect`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any


@dataclass(frozen=True)
class Linear:
    """One matrix [N, K]: `name` is its module path in the model once experts are unfused, `disk_name` the prefix of
    its tensors in the checkpoint (`disk_name`.weight, .bias); they differ where transformers renames.
    after_activation: whether it reads the output of the activation function (down_proj, fc2), where outliers are worst.
    """

    name: str
    N: int
    K: int
    bias: bool
    class_name: str
    disk_name: str
    after_activation: bool = False

    @property
    def numel(self) -> int:
        """Weights, bias not counted."""
        return self.N * self.K


@dataclass(frozen=True)
class ExpertStack:
    """A fused expert module and the linears inside it, one of each kind per expert.

    name: path of the module; path: the same relative to its block. gate is empty for experts without one.
    """

    name: str
    path: str
    class_name: str
    num_experts: int
    gate: tuple[Linear, ...]
    up: tuple[Linear, ...]
    down: tuple[Linear, ...]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order `UnfusedExperts` runs them: gate and up of every expert, then down of every expert."""
        pairs = zip(self.gate, self.up, strict=True) if self.gate else ((u,) for u in self.up)
        return (*(linear for pair in pairs for linear in pair), *self.down)


@dataclass(frozen=True)
class Kept:
    """A tensor that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def numel(self) -> int:
        """Values in the tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class Block:
    """One decoder block. linears: outside the expert stacks; all_linears: those, then the experts'.

    routers: names of the tensors that choose experts; they are in `kept` too, with every other matrix left alone.
    vector_params: values in norms, biases and other 1-D tensors.
    """

    name: str
    class_name: str
    linears: tuple[Linear, ...]
    experts: tuple[ExpertStack, ...]
    routers: tuple[str, ...]
    kept: tuple[Kept, ...]
    vector_params: int

    @property
    def all_linears(self) -> tuple[Linear, ...]:
        """Every linear of the block once its experts are unfused."""
        return (*self.linears, *(linear for stack in self.experts for linear in stack.linears))


@dataclass(frozen=True)
class Structure:
    """A causal language model as the pipeline sees it.

    blocks_name: path of the list of blocks. embedding, lm_head: module paths (lm_head None if there is none).
    tied: lm_head uses the embedding's weight. head: lm_head as a Linear, None if absent or of another kind.
    others: matrices outside the blocks, with the reason why they stay.
    """

    model_class: str
    blocks_name: str
    blocks: tuple[Block, ...]
    embedding: str
    embedding_shape: tuple[int, int]
    lm_head: str | None
    head: Linear | None
    tied: bool
    others: tuple[Kept, ...]
    parameters: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear of every block, in order."""
        return tuple(linear for block in self.blocks for linear in block.all_linears)


def describe(structure: Structure, bytes_on_disk: int | None = None) -> dict[str, Any]:
    """Plain values for `bitwright inspect`: counts, shapes, bytes, composition of the blocks, kept tensors.

    Blocks with the same composition are listed once, with the indices they stand for. bytes_16bit: all parameters
    at 16 bits; bytes_on_disk is passed through.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for i, block in enumerate(structure.blocks):
        composition = _composition(block)
        kinds.setdefault(repr(composition), {"indices": [], **composition})["indices"].append(i)
    linears = structure.linears
    experts = [linear for block in structure.blocks for stack in block.experts for linear in stack.linears]
    return {
        "model_class": structure.model_class,
        "blocks": structure.blocks_name,
        "num_blocks": len(structure.blocks),
        "num_linears": len(linears),
        "num_expert_linears": len(experts),
        "parameters": {
            "total": structure.parameters,
            "linears": sum(linear.numel for linear in linears),
            "expert_linears": sum(linear.numel for linear in experts),
            "embedding": structure.embedding_shape[0] * structure.embedding_shape[1],
        },
        "bytes_16bit": 2 * structure.parameters,
        "bytes_on_disk": bytes_on_disk,
        "embedding": {"name": structure.embedding, "shape": list(structure.embedding_shape)},
        "lm_head": {"name": structure.lm_head, "tied": structure.tied},
        "block_kinds": list(kinds.values()),
        "kept_outside_blocks": [_kept_dict(kept) for kept in structure.others],
    }


def _composition(block: Block) -> dict[str, Any]:
    def local(name: str) -> str:
        return name.removeprefix(block.name + ".")

    def shape(linears: tuple[Linear, ...]) -> list[int] | None:
        return [linears[0].N, linears[0].K] if linears else None

    return {
        "class": block.class_name,
        "linears": [
            {"name": local(x.name), "shape": [x.N, x.K], "bias": x.bias, "class": x.class_name} for x in block.linears
        ],
        "experts": [
            {
                "name": stack.path,
                "class": stack.class_name,
                "num_experts": stack.num_experts,
                "gate": shape(stack.gate),
                "up": shape(stack.up),
                "down": shape(stack.down),
            }
            for stack in block.experts
        ],
        "routers": [local(name) for name in block.routers],
        "kept": [_kept_dict(replace(kept, name=local(kept.name))) for kept in block.kept],
        "vector_params": block.vector_params,
        "linear_params": sum(x.numel for x in block.all_linears),
    }


def _kept_dict(kept: Kept) -> dict[str, Any]:
    return {"name": kept.name, "shape": list(kept.shape), "reason": kept.reason}
