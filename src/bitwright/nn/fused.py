"""A decode step of models built like Llama or OPT, out of kernels that each do the work of several of torch's.

Between the linears of a block transformers starts some forty kernels of a few microseconds each, which is as long as
4-bit linears take. Here a block is: a norm (with the sum before it), one linear for q, k and v, attention that also
rotates and writes the cache, the output linear, a norm, one linear for gate and up, their product, the last linear.
Of experts in stacks the second norm chooses, too, and the next one adds up what they gave.

`anatomy` reads what a model is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.kernels import attention
from bitwright.kernels.elementwise import add_norm, silu_mul
from bitwright.kernels.routing import Outputs, combine_norm, norm_route
from bitwright.nn.experts import ExpertStack

Linear = Callable[[Tensor], Tensor]

_DTYPES = (torch.bfloat16, torch.float16)  # that the kernels between linears compute in


class Unknown(Exception):
    """A model that is built otherwise; the message says where."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: weight [H]; with a bias [H] a LayerNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor | Outputs | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + x, residual + x); what experts gave is summed first."""
        if isinstance(x, Outputs):
            return combine_norm(x, residual, *self.values)
        return add_norm(x, residual, *self.values)

    def of_heads(self, x: Tensor) -> Tensor:
        """Every head of x [B, heads D] by itself, for a weight [D]."""
        return self(None, x.reshape(-1, len(self.weight)))[0].view(x.shape)

    @property
    def values(self) -> tuple[Tensor, Tensor | None, float, bool]:
        """As the kernels take them: weight, bias, eps, and whether the mean is taken off."""
        return self.weight, self.bias, self.eps, self.bias is not None


@dataclass(frozen=True)
class Experts:
    """Experts in stacks and their router [E, H]: of each token the `top_k` best, weighted by a softmax over them."""

    router: Tensor
    top_k: int
    up: ExpertStack
    down: ExpertStack

    def __call__(self, norm: Norm, x: Tensor, residual: Tensor) -> tuple[Outputs, Tensor]:
        """(what they make of the norm of residual + x, not summed yet, residual + x)."""
        rows, residual, routing = norm_route(x, residual, *norm.values, self.router, self.top_k)
        inner = silu_mul(self.up(rows, routing.offsets))
        return Outputs(self.down(inner, routing.offsets, settled=True), routing), residual


@dataclass(frozen=True)
class Block:
    """qkv: [B, H] -> [B, (heads + 2 kv_heads) D]; head_norms: of queries and of keys; mlp: [B, H] -> [B, H]."""

    norm: Norm
    qkv: Linear
    head_norms: tuple[Norm, Norm] | None
    o: Linear
    mlp_norm: Norm
    mlp: Linear | Experts

    def behind_attention(self, x: Tensor, residual: Tensor) -> tuple[Tensor | Outputs, Tensor]:
        """(what the MLP makes of the norm of residual + x, residual + x)."""
        if isinstance(self.mlp, Experts):
            return self.mlp(self.mlp_norm, x, residual)
        y, residual = self.mlp_norm(x, residual)
        return self.mlp(y), residual


@dataclass(frozen=True)
class Anatomy:
    """What a step of a model is made of.

    embedding: tokens [B, 1], positions [B, 1] -> [B, H]; places: how many positions it knows, None for any.
    rotary: the module that makes its tables, or None.
    """

    embedding: Callable[[Tensor, Tensor], Tensor]
    places: int | None
    rotary: nn.Module | None
    blocks: tuple[Block, ...]
    norm: Norm
    head: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def dtype(self) -> torch.dtype:
        """Of its norms, and so of what goes from block to block."""
        return self.norm.weight.dtype

    def tables(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """cos and sin, float32 [positions, head_dim / 2]. Unknown if pairs are not (i, i + head_dim / 2)."""
        if self.rotary is None:
            return None, None
        like = torch.empty(1, 1, dtype=torch.float32, device=device)
        both = self.rotary(like, torch.arange(positions, device=device)[None])
        half = self.head_dim // 2
        for table in both:
            if table.shape != (1, positions, 2 * half) or not torch.equal(table[..., :half], table[..., half:]):
                raise Unknown("its rotary tables are of another kind")
        cos, sin = (t[0, :, :half].float().contiguous() for t in both)
        return cos, sin


class FusedStep:
    """One token more for `batch` sequences of at most `length` tokens, over the layers of a static cache.

    `layers` have keys and values [batch, kv_heads, length, D], which the step writes; what they count is left alone.
    """

    def __init__(self, anatomy: Anatomy, layers: Sequence[Any], batch: int, length: int) -> None:
        a, device = anatomy, layers[0].keys.device
        shape = (batch, a.kv_heads, length, a.head_dim)
        caches = [(layer.keys, layer.values) for layer in layers]
        if len(caches) != len(a.blocks) or any(t.shape != shape or not t.is_contiguous() for kv in caches for t in kv):
            raise Unknown("its cache has another shape than its linears")
        dtypes = {t.dtype for kv in caches for t in kv} | {a.dtype}
        if len(dtypes) > 1 or (device.type == "cuda" and a.dtype not in _DTYPES):
            raise Unknown(f"its norms and its cache are of {' and '.join(map(str, dtypes))}, not all of 16 bits")
        self._anatomy, self._caches = a, caches
        self._cos, self._sin = a.tables(length, device)
        turned = a.rotary is not None
        self._scratch = attention.workspace(batch, a.heads, a.kv_heads, a.head_dim, length, device, a.dtype, turned)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [batch, V] after tokens [batch, 1] at positions [batch, 1]."""
        a = self._anatomy
        # Before the embedding, a plain launch: attention reads them while the kernel before it still runs.
        where = positions[:, 0].to(torch.int32)
        h = a.embedding(tokens, positions)
        x: Tensor | Outputs | None = None
        for block, (keys, values) in zip(a.blocks, self._caches, strict=True):
            y, h = block.norm(x, h)
            qkv = self._heads_normed(block, block.qkv(y))
            y = attention.decode(qkv, self._cos, self._sin, where, keys, values, self._scratch)
            x, h = block.behind_attention(block.o(y.view(len(tokens), -1)), h)
        logits: Tensor = a.head(a.norm(x, h)[0])
        return logits

    def _heads_normed(self, block: Block, qkv: Tensor) -> Tensor:
        if block.head_norms is None:
            return qkv
        a = self._anatomy
        q, k, v = qkv.split([n * a.head_dim for n in (a.heads, a.kv_heads, a.kv_heads)], dim=-1)
        of_queries, of_keys = block.head_norms
        return torch.cat([of_queries.of_heads(q), of_keys.of_heads(k), v], dim=-1)
