"""Shapes of published models, as their config.json says: enough to build a layer with random weights and count bytes.

A layer's linears stand as servers run them: q, k and v of one token come from one matrix, gate and up from another, so
four matrices a layer instead of seven. Nothing is downloaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from bitwright.errors import BitwrightError


@dataclass(frozen=True)
class LinearShape:
    """A weight [N, K] of a layer. count: how many of it a layer has (1, or its experts)."""

    name: str
    N: int
    K: int
    count: int = 1

    @property
    def weights(self) -> int:
        """Weights of all `count` matrices."""
        return self.N * self.K * self.count


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer.

    heads, kv_heads, head_dim: of the attention. experts, top_k: 0 for a dense model. activation "silu" is gated (gate
    and up), "relu" is not. positions: rows of a learned position table, 0 with rotary embeddings. tied: the output head
    is the embedding. bias: linears have one. context: tokens it was trained for.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    context: int
    head_dim: int = 128
    experts: int = 0
    top_k: int = 0
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    activation: Literal["silu", "relu"] = "silu"
    bias: bool = False
    tied: bool = False
    positions: int = 0

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside the up projection."""
        return self.activation == "silu"

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """The matrices of one layer that are quantized: qkv, o, gate_up (up without a gate), down; experts counted."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        up = LinearShape("gate_up" if self.gated else "up", (1 + self.gated) * self.intermediate, self.hidden)
        down = LinearShape("down", self.hidden, self.intermediate)
        if self.experts:
            up, down = (LinearShape(x.name, x.N, x.K, self.experts) for x in (up, down))
        return (
            LinearShape("qkv", qkv, self.hidden),
            LinearShape("o", self.hidden, self.heads * self.head_dim),
            up,
            down,
        )

    @property
    def linear_weights(self) -> int:
        """Weights of the quantized matrices of all layers."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def other_weights(self) -> int:
        """Parameters that stay at 16 bits: embedding, head, positions, norms, biases, routers."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2) + self.positions * self.hidden
        norm = self.hidden * (2 if self.norm == "layernorm" else 1)
        biases = sum(linear.N * linear.count for linear in self.linears) if self.bias else 0
        return tables + norm + self.layers * (2 * norm + biases + self.experts * self.hidden)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.linear_weights + self.other_weights

    def kv_cache_values(self, batch: int, context: int) -> int:
        """Numbers in the key and value caches of `batch` sequences of `context` tokens, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * batch * context


def _opt(name: str, hidden: int, layers: int) -> ModelShape:
    """OPT differs in size alone: heads of 128, four times as wide inside, 50272 words, 2048 + 2 learned positions."""
    heads = hidden // 128
    return ModelShape(
        name,
        hidden,
        4 * hidden,
        heads,
        heads,
        layers,
        vocab=50272,
        context=2048,
        norm="layernorm",
        activation="relu",
        bias=True,
        tied=True,
        positions=2050,
    )


MODELS: tuple[ModelShape, ...] = (
    ModelShape("llama-2-7b", 4096, 11008, 32, 32, 32, vocab=32000, context=4096),
    ModelShape("llama-2-13b", 5120, 13824, 40, 40, 40, vocab=32000, context=4096),
    ModelShape("llama-2-70b", 8192, 28672, 64, 8, 80, vocab=32000, context=4096),
    ModelShape("llama-3-8b", 4096, 14336, 32, 8, 32, vocab=128256, context=8192),
    _opt("opt-30b", 7168, 48),
    _opt("opt-66b", 9216, 64),
    _opt("opt-175b", 12288, 96),
    ModelShape("mixtral-8x7b", 4096, 14336, 32, 8, 32, vocab=32000, context=32768, experts=8, top_k=2),
)

# N x K of the kernel tables: square matrices, the fused up projections and the widest inputs of the models above.
KERNEL_SHAPES: tuple[tuple[int, int], ...] = (
    (4096, 4096),
    (22016, 4096),
    (8192, 8192),
    (8192, 28672),
    (57344, 8192),
    (49152, 12288),
)


def models(name: str) -> ModelShape:
    """The shape called `name` (any case); BitwrightError lists the known ones."""
    for model in MODELS:
        if model.name == name.strip().lower():
            return model
    raise BitwrightError(f"no model shape {name!r}; choose one of {', '.join(model.name for model in MODELS)}")


def parse_shape(text: str) -> tuple[int, int]:
    """(N, K) of "4096x14336"; BitwrightError says what was expected."""
    found = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text.strip().lower())
    if found is None:
        raise BitwrightError(f"shape {text!r} is not outputs x inputs; write it as in 22016x4096")
    return int(found[1]), int(found[2])
