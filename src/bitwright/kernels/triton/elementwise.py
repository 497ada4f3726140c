"""Triton kernels for what lies between the linears: residual + norm, rotary embedding + cache write, silu * mul.

Between two linears of a decoding step there are a few kilobytes, so what counts is the number of launches: one kernel
each, float32 inside, 16 bits in and out. `elementwise` chooses between these and their plain twins. Where the GPU can,
a kernel begins while the linear before it still runs, and lets the linear after it begin (`dependent`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels import dependent
from bitwright.kernels.dependent import release, wait


@triton.jit
def normalized(h, gain, shift, inside, H, eps, CENTER: tl.constexpr, BIAS: tl.constexpr):
    """The norm of a row h, float32."""
    h = h.to(tl.float32)
    if CENTER:
        h = tl.where(inside, h - tl.sum(h) / H, 0.0)
    y = h * tl.rsqrt(tl.sum(h * h) / H + eps) * gain.to(tl.float32)
    if BIAS:
        y += shift.to(tl.float32)
    return y


@triton.jit
def _add_norm(
    x,
    places,
    shares,
    residual,
    weight,
    bias,
    normed,
    total,
    H,
    eps,
    ADD: tl.constexpr,
    TOP: tl.constexpr,
    BT: tl.constexpr,
    CENTER: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row = tl.program_id(0).to(tl.int64) * H
    i = tl.arange(0, BLOCK)
    inside = i < H
    gain = tl.load(weight + i, mask=inside, other=0.0)
    shift = gain
    if BIAS:
        shift = tl.load(bias + i, mask=inside, other=0.0)
    wait(PDL)
    h = tl.load(residual + row + i, mask=inside, other=0.0)
    if ADD:
        if TOP > 0:
            tl.debug_barrier()  # or h is fetched last, once the rows are here: the compiler saves registers
            t = tl.arange(0, BT)
            choice = tl.program_id(0) * TOP + t
            place = tl.load(places + choice, mask=t < TOP, other=0).to(tl.int64)
            share = tl.load(shares + choice, mask=t < TOP, other=0.0)
            parts = tl.load(x + place[:, None] * H + i[None, :], mask=(t < TOP)[:, None] & inside[None, :], other=0.0)
            added = tl.sum(share[:, None] * parts.to(tl.float32), 0)
            added = added.to(normed.dtype.element_ty)
        else:
            added = tl.load(x + row + i, mask=inside, other=0.0)
        h = (h.to(tl.float32) + added.to(tl.float32)).to(normed.dtype.element_ty)
        tl.store(total + row + i, h, mask=inside)
    y = normalized(h, gain, shift, inside, H, eps, CENTER, BIAS)
    tl.store(normed + row + i, y.to(normed.dtype.element_ty), mask=inside)


def add_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    places: Tensor | None = None,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `elementwise.add_norm`; one program per row, the row in registers.

    places, shares [M, top_k]: x are the rows of experts, to be summed as in `routing.combine`. weight and bias are read
    before the launch before this one is waited for (`dependent`).
    """
    M, H = residual.shape
    normed = torch.empty_like(residual)
    total = residual if x is None else torch.empty_like(residual)
    block = triton.next_power_of_2(H)
    top_k = 0 if places is None else places.shape[1]
    _add_norm[(M,)](
        residual if x is None else x,
        residual if places is None else places,
        residual if shares is None else shares,
        residual,
        weight,
        weight if bias is None else bias,
        normed,
        total,
        H,
        eps,
        ADD=x is not None,
        TOP=top_k,
        BT=triton.next_power_of_2(max(1, top_k)),
        CENTER=center,
        BIAS=bias is not None,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
        **dependent.options(residual.device),
    )
    return normed, total


@triton.jit
def _rope_cache(
    qkv,
    cos,
    sin,
    start,
    q,
    keys,
    values,
    T,
    S,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sequence = token // T
    position = tl.load(start + sequence).to(tl.int64) + token % T
    d = tl.arange(0, HALF)[None, :]
    at = (token * (HEADS + 2 * KV) + head)[:, None] * (2 * HALF) + d
    inside = (head < HEADS + 2 * KV)[:, None]
    a = tl.load(qkv + at, mask=inside, other=0.0)
    b = tl.load(qkv + at + HALF, mask=inside, other=0.0)
    if ROPE:
        angle = tl.minimum(position, S - 1) * HALF + d
        c = tl.load(cos + angle)
        s = tl.load(sin + angle)
        turned = (head < HEADS + KV)[:, None]
        first, second = a.to(tl.float32), b.to(tl.float32)
        a = tl.where(turned, first * c - second * s, first).to(a.dtype)
        b = tl.where(turned, second * c + first * s, second).to(b.dtype)
    is_q = (head < HEADS)[:, None]
    at = (token * HEADS + head)[:, None] * (2 * HALF) + d
    tl.store(q + at, a, mask=is_q)
    tl.store(q + at + HALF, b, mask=is_q)
    room = position < S  # a write past the cache would land in the next head
    is_k = ((head >= HEADS) & (head < HEADS + KV) & room)[:, None]
    at = ((sequence * KV + head - HEADS) * S + position)[:, None] * (2 * HALF) + d
    tl.store(keys + at, a, mask=is_k)
    tl.store(keys + at + HALF, b, mask=is_k)
    is_v = (head >= HEADS + KV)[:, None] & inside & room
    at = ((sequence * KV + head - HEADS - KV) * S + position)[:, None] * (2 * HALF) + d
    tl.store(values + at, a, mask=is_v)
    tl.store(values + at + HALF, b, mask=is_v)


def rope_cache(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, start: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """See `elementwise.rope_cache`; one program per token and a few heads."""
    M, width = qkv.shape
    B, KV, S, D = keys.shape
    heads = width // D - 2 * KV
    q = qkv.new_empty(M, heads, D)
    rows = 8
    _rope_cache[(M, triton.cdiv(heads + 2 * KV, rows))](
        qkv,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        start,
        q,
        keys,
        values,
        M // B,
        S,
        HEADS=heads,
        KV=KV,
        HALF=D // 2,
        ROPE=cos is not None,
        ROWS=rows,
        num_warps=2,
        **dependent.options(qkv.device),
    )
    return q


@triton.jit
def _silu_mul(gate_up, out, I, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = tl.load(gate_up + row * 2 * I + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * I + i, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `elementwise.silu_mul`."""
    M, I = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(M, I)
    block = 1024
    grid = (M, triton.cdiv(I, block))
    _silu_mul[grid](gate_up, out, I, BLOCK=block, num_warps=4, **dependent.options(gate_up.device))
    return out


@triton.jit
def _relu(x, out, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    wait(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i, mask=i < count, other=0.0)
    tl.store(out + i, tl.where(y < 0, 0.0, y), mask=i < count)


def relu(x: Tensor) -> Tensor:
    """See `elementwise.relu`."""
    out = torch.empty_like(x)
    block = 1024
    _relu[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), BLOCK=block, num_warps=4, **dependent.options(x.device))
    return out
