"""Attention over a KV cache: decoding split over the sequence, prefill by torch.

`decode` reads how far each sequence is from device memory, so that one captured graph serves a growing context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bitwright.kernels.elementwise import rope_cache_reference
from bitwright.kernels.machine import machine
from bitwright.kernels.nvrtc import decode_attention
from bitwright.kernels.problem import cuda_features

_PROGRAMS = 128  # about as many as an H100 has SMs: more only add merging
_BLOCK = 128  # keys a step


@dataclass(frozen=True)
class Split:
    """How a decode step is cut: `splits` programs per (sequence, kv head), each in steps of `block` keys."""

    splits: int
    block: int


def choose_split(batch: int, kv_heads: int, capacity: int) -> Split:
    """A program for each SM, if that leaves it 128 keys or more at a context of `capacity` (dev/LOG.md)."""
    pairs = batch * kv_heads
    splits = max(1, min(_PROGRAMS // pairs, capacity // _BLOCK))
    # Several programs on one SM hide from each other what they wait for, and smaller ones fit in greater number.
    return Split(splits, _BLOCK if pairs * splits <= 2 * _PROGRAMS and capacity >= _BLOCK else _BLOCK // 2)


@dataclass(frozen=True)
class Workspace:
    """Scratch of `decode`, overwritten by every call: calls that share it must follow one another on one stream.

    partial float32 [B kv_heads splits, group, D], stats float32 [..., 2], counters int32 [B kv_heads], zero between
    calls. Only a GPU uses them, and only without `config`: the kernel for Hopper, where it suits, needs none.
    """

    split: Split
    config: decode_attention.Config | None
    partial: Tensor
    stats: Tensor
    counters: Tensor


def workspace(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    rope: bool = True,
) -> Workspace:
    """Scratch for caches of `capacity` positions."""
    device = torch.device(device)
    split = choose_split(batch, kv_heads, capacity)
    config = None
    there = device.type == "cuda" and cuda_features(device) >= decode_attention.FEATURES
    if there and decode_attention.takes(heads, kv_heads, head_dim):
        processors = machine(device)[1]
        config = decode_attention.choose(batch, heads, kv_heads, head_dim, capacity, dtype, processors, rope=rope)
        config = config if decode_attention.suits(config, capacity) else None
    slots = batch * heads * split.splits if split.splits > 1 and config is None else 0
    return Workspace(
        split,
        config,
        torch.empty(slots, head_dim, dtype=torch.float32, device=device),
        torch.empty(slots, 2, dtype=torch.float32, device=device),
        torch.zeros(batch * kv_heads, dtype=torch.int32, device=device),
    )


def decode(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    scratch: Workspace,
) -> Tensor:
    """Attention of one new token per sequence [B, heads, D], of qkv [B, (heads + 2 kv_heads) D] before rotation.

    Sequence b stands at positions[b] (int32 [B], on the device): its key and value go into the caches keys, values
    [B, kv_heads, S, D] there, and it sees positions 0 .. positions[b]; at S and beyond nothing is written, and it sees
    the cache alone. cos, sin: as for `elementwise.rope_cache`. Query head h reads kv head h // (heads / kv_heads).
    softmax(q kᵀ / sqrt(D)) v in float32; probabilities of cached keys are rounded to the dtype of v.
    """
    if qkv.is_cuda:
        from bitwright.kernels.triton import attention as kernels

        s = scratch
        if s.config is not None:
            return decode_attention.decode(qkv, cos, sin, positions, keys, values, s.config)
        return kernels.decode(
            qkv,
            cos,
            sin,
            positions,
            keys,
            values,
            s.split.splits,
            s.split.block,
            (s.partial, s.stats, s.counters),
        )
    return decode_reference(qkv, cos, sin, positions, keys, values)


def decode_reference(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The twin of `decode`: first into the caches, then the products."""
    q = rope_cache_reference(qkv, cos, sin, positions, keys, values)
    return attend_reference(q, keys, values, positions)


def attend_reference(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v of rotated queries q [B, heads, D] over positions 0 .. positions[b], in float32."""
    B, heads, D = q.shape
    KV, S = keys.shape[1], keys.shape[2]
    grouped = q.view(B, KV, heads // KV, D).float()
    scores = grouped @ keys.float().transpose(-1, -2) / D**0.5  # [B, KV, group, S]
    hidden = torch.arange(S, device=q.device) > positions[:, None]
    scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
    seen = values.float().masked_fill(hidden[:, None, :, None], 0.0)  # what was never written may be NaN
    return (scores.softmax(dim=-1) @ seen).view(B, heads, D).to(q.dtype)


def prefill(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of a whole prompt: q [B T, heads, D], keys and values [B, kv_heads, S >= T, D] -> like q."""
    B, _, _, D = keys.shape
    T = q.shape[0] // B
    heads = q.view(B, T, -1, D).transpose(1, 2)
    grouped = heads.shape[1] != keys.shape[1]
    y = scaled_dot_product_attention(heads, keys[:, :, :T], values[:, :, :T], is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2).reshape(q.shape)
