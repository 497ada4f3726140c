"""A token's columns as device code: where each lies, and what it is before it is quantized.

A column is taken as it is, or it is one of three results that another kernel would have written to memory and read
back, rounded as that one rounds: a norm (`triton.norm`), the norm of a sum, or silu(gate) · up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitwright.kernels.triton.fragment import INTERPRET
from bitwright.kernels.triton.norm import normed, rounded_float


@triton.jit
def columns_of(first, WIDTH: tl.constexpr, WARPS: tl.constexpr, REPEATS: tl.constexpr):
    """int32 [WIDTH, WARPS, REPEATS]: the columns from `first` on, those of a warp side by side.

    The compiler gives lanes to the first axis and warps to the second, also where addresses are gathered and it has no
    better reason than their order; then nothing changes its place from load to store, and tests hold it to that.
    """
    j = tl.arange(0, WIDTH)[:, None, None]
    w = tl.arange(0, WARPS)[None, :, None]
    return first + (w * REPEATS + tl.arange(0, REPEATS)[None, None, :]) * WIDTH + j


@triton.jit
def _butterflies(y, sign, AXIS: tl.constexpr):
    """y with a, b along AXIS (two long) replaced by a + b, a - b; sign: 1, -1 along AXIS."""
    if INTERPRET:  # sums of two terms, because it takes minutes for any other reduction
        result = tl.where(sign > 0, tl.sum(y, AXIS, keep_dims=True), tl.sum(y * sign, AXIS, keep_dims=True))
    else:
        bits = y.to(tl.int32, bitcast=True)
        other = (bits ^ tl.xor_sum(bits, AXIS, keep_dims=True)).to(tl.float32, bitcast=True)
        result = other + y * sign
    return result


@triton.jit
def rotated(y, BLOCK: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, REPEATS: tl.constexpr):
    """`activations.rotate` of y, columns as in `columns_of`, over blocks of BLOCK columns."""
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
    for i in tl.static_range(0, 31):
        if (1 << i) < BLOCK:
            if (1 << i) < WIDTH:
                pairs = tl.reshape(y, [WIDTH >> (i + 1), 2, 1 << i, WARPS, REPEATS])
                pairs = _butterflies(pairs, sign[None, :, None, None, None], 1)
            else:
                pairs = tl.reshape(y, [WIDTH, WARPS, (REPEATS * WIDTH) >> (i + 1), 2, (1 << i) // WIDTH])
                pairs = _butterflies(pairs, sign[None, None, None, :, None], 3)
            y = tl.reshape(pairs, [WIDTH, WARPS, REPEATS])
    return y


@triton.jit
def gated(gate, up):
    """silu(gate) · up as float32, rounded once to their dtype.

    On a GPU the bits are those of gate / (1.0 + tl.exp(-gate)) * up, from half as many instructions: none to guard
    against what cannot be here. The divisor is at least 1; an exponential that is no normal float is lost in it; and a
    quarter of it, and of the gate, has the same quotient, but a reciprocal that is a normal float.
    """
    wide = gate.to(tl.float32)
    if INTERPRET:
        silu = wide / (1.0 + tl.exp(-wide))
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [wide * -1.4426950408889634], tl.float32, is_pure=True, pack=1
        )
        quarter = tl.fma(power, 0.25, 0.25)
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [quarter], tl.float32, is_pure=True, pack=1
        )
        silu = wide * 0.25 * inverse
    return rounded_float(silu * up.to(tl.float32), gate.dtype)


@triton.jit
def load_columns(x, weight, rstd, K, column, inside, SILU: tl.constexpr, ONCE: tl.constexpr):
    """Columns `column` of a token, 0 where not `inside`: as they are, or float32 that the dtype of x can hold.

    SILU: gates, with the other factors K columns behind them; ONCE: see `norm.normed`.
    """
    y = tl.load(x + column, mask=inside, other=0.0)
    if SILU:
        y = gated(y, tl.load(x + K + column, mask=inside, other=0.0))
    if weight is not None:
        y = normed(y, rstd, tl.load(weight + column, mask=inside, other=0.0), ONCE)
    return y


@triton.jit
def load_base(
    x, weight, rstd, base_idx, K, column, B, SILU: tl.constexpr, ONCE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """float32: base columns `column` of a token, then rotated; 0 from B on."""
    inside = column < B
    from_ = column if base_idx is None else tl.load(base_idx + column, mask=inside, other=0)
    y = load_columns(x, weight, rstd, K, from_, inside, SILU, ONCE).to(tl.float32)
    if BLOCK > 1:
        y = rotated(y, BLOCK, WIDTH, WARPS, REPEATS)
    return y
