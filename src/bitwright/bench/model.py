"""A decoder small enough to read, of real shape and random weights: what the whole-model benchmarks time.

One program for all of them: rotary or learned positions, RMSNorm or LayerNorm, gated, plain or expert MLPs. The 16-bit
model and the quantized one differ in their linears and in nothing else, so that a difference in time is theirs. A block
is a handful of launches (norm, qkv, attention, o, norm, up, activation, down; with experts, the norm before them also
sends tokens to them, and the norm after them sums what they gave; a linear that quantizes its input gets that done by
the kernel of the norm or the activation before it) without a word to the host, so that a step can be
captured in a CUDA graph.

Weights are made on the device, at random: speed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

from bitwright.bench.linears import Maker
from bitwright.bench.mlp import Experts, Linear, Mlp, MoE, Norm
from bitwright.bench.schemes import linear_scheme
from bitwright.bench.shapes import ModelShape
from bitwright.errors import BitwrightError
from bitwright.kernels import attention
from bitwright.kernels.elementwise import rope_cache, rope_tables
from bitwright.kernels.routing import Outputs
from bitwright.scheme import Scheme

_ROPE_BASE = 10000.0
_OPT_OFFSET = 2  # OPT's position table starts two rows late


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    norm: Norm
    qkv: Linear
    o: Linear
    mlp_norm: Norm
    mlp: Mlp | MoE

    def dense(self) -> Block:
        """The same with dequantized weights."""
        return replace(self, qkv=self.qkv.dense(), o=self.o.dense(), mlp=self.mlp.dense())

    @property
    def nbytes(self) -> int:
        """Bytes of its linears."""
        return self.qkv.nbytes + self.o.nbytes + self.mlp.nbytes


@dataclass(frozen=True)
class Tables:
    """What stays at 16 bits and is shared by the models compared: embedding, head [vocab, hidden], learned positions
    [positions, hidden] or None, the last norm."""

    embedding: Tensor
    head: Tensor
    positions: Tensor | None
    norm: Norm

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, a tied head counted once."""
        tied = self.head.data_ptr() == self.embedding.data_ptr()
        positions = 0 if self.positions is None else self.positions.nbytes
        return self.embedding.nbytes + (0 if tied else self.head.nbytes) + positions


@dataclass(frozen=True)
class State:
    """What a batch of sequences carries from token to token; every step changes it.

    ids int64 [B]: the tokens to be fed next. positions int32 [B]: where they stand. keys, values: one cache
    [B, kv_heads, S, D] per block. cos, sin: float32 [S, D / 2], or None with learned positions.
    """

    ids: Tensor
    positions: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cos: Tensor | None
    sin: Tensor | None
    scratch: attention.Workspace

    @property
    def capacity(self) -> int:
        """S, positions there is room for."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def first(self, layers: int) -> State:
        """The same state for the first `layers` blocks, over the same memory."""
        return replace(self, keys=self.keys[:layers], values=self.values[:layers])


@dataclass(frozen=True)
class Decoder:
    """A model: `tables`, then `blocks`, as many as were made (not always all that the shape has)."""

    shape: ModelShape
    tables: Tables
    blocks: tuple[Block, ...]

    def prefill(self, state: State, ids: Tensor) -> Tensor:
        """Logits [B, vocab] after the prompts ids [B, T]; the state then stands behind them, greedy tokens chosen."""
        B, T = ids.shape
        state.positions.zero_()
        where = torch.arange(T, device=ids.device).repeat(B)

        def attend(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            q = rope_cache(qkv, state.cos, state.sin, state.positions, keys, values)
            return attention.prefill(q, keys, values)

        h = self._run(state, self._embed(ids.flatten(), where), attend)
        logits = torch.mm(h.view(B, T, -1)[:, -1], self.tables.head.t())
        state.positions.fill_(T)
        state.ids.copy_(logits.argmax(dim=-1))
        return logits

    def step(self, state: State) -> Tensor:
        """Logits [B, vocab] after one more token of every sequence; the greedy ones are fed next."""

        def attend(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return attention.decode(qkv, state.cos, state.sin, state.positions, keys, values, state.scratch)

        h = self._run(state, self._embed(state.ids, state.positions), attend)
        logits = torch.mm(h, self.tables.head.t())
        state.positions.add_(1)
        state.ids.copy_(logits.argmax(dim=-1))
        return logits

    def first(self, layers: int) -> Decoder:
        """The first `layers` blocks, over the same weights."""
        return replace(self, blocks=self.blocks[:layers])

    def dense(self) -> Decoder:
        """The same model with every quantized weight dequantized."""
        return replace(self, blocks=tuple(block.dense() for block in self.blocks))

    @property
    def block_bytes(self) -> int:
        """Bytes of the linears of one block."""
        return self.blocks[0].nbytes

    def linear_calls(self, M: int) -> list[Callable[[], Tensor]]:
        """The linears of all blocks alone, each ready to be called on M random tokens.

        Every one has its own, as in the model: of one tensor, linears that share a split would quantize it once.
        """
        like = self.tables.embedding
        s = self.shape
        x = torch.randn(M, s.hidden, dtype=like.dtype, device=like.device)
        y = torch.randn(M, s.heads * s.head_dim, dtype=like.dtype, device=like.device)
        calls: list[Callable[[], Tensor]] = []
        for block in self.blocks:
            calls += [partial(block.qkv, x.clone()), partial(block.o, y.clone()), *block.mlp.calls(x.clone())]
        return calls

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        h = embedding(ids, self.tables.embedding)
        return h if self.tables.positions is None else h + embedding(positions + _OPT_OFFSET, self.tables.positions)

    def _run(self, state: State, h: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Hidden states [M, hidden] through all blocks and the last norm."""
        x: Tensor | Outputs | None = None
        for block, keys, values in zip(self.blocks, state.keys, state.values, strict=True):
            qkv, h = block.norm.into(block.qkv, x, h)
            x = block.o(attend(qkv, keys, values).view(h.shape[0], -1))
            x, h = block.mlp(block.mlp_norm, x, h)
        return self.tables.norm(x, h)[0]


def make_tables(shape: ModelShape, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Tables:
    """Random tables for models of `shape`."""
    maker = _maker(None, dtype, device, seed)
    words = maker.normal((shape.vocab, shape.hidden), 1.0)
    # A tied head takes normed states times sqrt(hidden) too many; greedy tokens do not mind.
    head = words if shape.tied else maker.normal((shape.vocab, shape.hidden), shape.hidden**-0.5)
    positions = maker.normal((shape.positions, shape.hidden), 0.1) if shape.positions else None
    return Tables(words, head, positions, _norm(shape, maker))


def make_model(
    shape: ModelShape,
    scheme: Scheme | None,
    tables: Tables,
    layers: int | None = None,
    seed: int = 0,
) -> Decoder:
    """A model of `shape` with `layers` blocks (None: all) at `scheme` (None: 16 bits), beside `tables`.

    BitwrightError for heads that the kernels do not take.
    """
    check_shape(shape)
    maker = _maker(scheme, tables.embedding.dtype, tables.embedding.device, seed + 1)
    by_name = {x.name: x for x in shape.linears}

    def maker_of(name: str) -> tuple[Maker, int, int]:
        x = by_name[name]
        return replace(maker, scheme=linear_scheme(x, shape, scheme)), x.N, x.K

    def linear(name: str) -> Linear:
        one, N, K = maker_of(name)
        return one.linear(N, K, shape.bias)

    def experts(name: str) -> Experts:
        one, N, K = maker_of(name)
        return one.experts(shape.experts, N, K)

    def mlp() -> Mlp | MoE:
        up = "gate_up" if shape.gated else "up"
        if shape.experts:
            router = maker.normal((shape.experts, shape.hidden), shape.hidden**-0.5)
            return MoE(router, experts(up), experts("down"), shape.gated, shape.top_k)
        return Mlp(linear(up), linear("down"), shape.gated)

    blocks = tuple(
        Block(
            _norm(shape, maker),
            linear("qkv"),
            linear("o"),
            _norm(shape, maker),
            mlp(),
        )
        for _ in range(shape.layers if layers is None else layers)
    )
    return Decoder(shape, tables, blocks)


def make_state(
    shape: ModelShape,
    layers: int,
    batch: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> State:
    """Caches of `layers` blocks with room for `capacity` tokens, filled at random, as if long in use."""
    if shape.positions and capacity + _OPT_OFFSET > shape.positions:
        raise BitwrightError(
            f"{shape.name} has {shape.positions - _OPT_OFFSET} positions, fewer than {capacity}; ask for less context"
        )
    maker = _maker(None, dtype, device, seed + 2)
    size = (batch, shape.kv_heads, capacity, shape.head_dim)
    keys, values = (tuple(maker.normal(size, 1.0) for _ in range(layers)) for _ in range(2))
    cos, sin = (None, None) if shape.positions else rope_tables(capacity, shape.head_dim, _ROPE_BASE, device)
    return State(
        torch.randint(shape.vocab, (batch,), device=device, generator=maker.generator),
        torch.zeros(batch, dtype=torch.int32, device=device),
        keys,
        values,
        cos,
        sin,
        attention.workspace(
            batch, shape.heads, shape.kv_heads, shape.head_dim, capacity, device, dtype, rope=cos is not None
        ),
    )


def check_shape(shape: ModelShape) -> None:
    """BitwrightError unless head_dim is a power of two from 16 to 256 and heads are a multiple of kv_heads."""
    d = shape.head_dim
    if d not in (16, 32, 64, 128, 256) or shape.heads % shape.kv_heads:
        raise BitwrightError(
            f"{shape.name}: head_dim {d}, {shape.heads} heads on {shape.kv_heads}; the benchmark's attention takes a "
            "head_dim of 16, 32, 64, 128 or 256 and heads that are a multiple of kv_heads"
        )


def _maker(scheme: Scheme | None, dtype: torch.dtype, device: torch.device | str, seed: int) -> Maker:
    device = torch.device(device)
    return Maker(scheme, dtype, device, torch.Generator(device).manual_seed(seed))


def _norm(shape: ModelShape, maker: Maker) -> Norm:
    bias = maker.normal((shape.hidden,), 0.1) if shape.norm == "layernorm" else None
    return Norm(maker.normal((shape.hidden,), 0.1, 1.0), bias)
