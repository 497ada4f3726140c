"""Activations become integer codes and 16-bit outliers (`bitwright.activations`), in one kernel and one pass.

One program per token. It gathers the base columns in their stored order, rotates them, takes the largest and smallest
value, and writes codes, scale and zero point; outliers are copied as they are. Nothing but the two extremes crosses the
borders of a warp, so a token of up to `WHOLE` columns is read once and stays in registers. A longer one is read twice,
the second time from L2.

Every bit is that of `bitwright.activations`: extremes do not depend on an order, sums of a rotation are those of its
butterflies, and what is rounded is rounded once. Three things make it so:

* *Extremes* are taken of bit patterns: those of floats that are not negative compare like integers, and NaN lies above
  Inf, so that it is found like any other number, which a float maximum of the GPU would pass over.
* *x / scale* is a division by one number for a whole token, so its reciprocal r is computed once. q = x r, twice
  corrected with q += (x - q scale) r in fused operations, is the quotient rounded once: the first leaves q within one
  unit in the last place, and from there the second is exact (Markstein, IBM J. Res. Dev. 34(1), 1990, for a correctly
  rounded r). Scales so small or large that something would leave the range of normal floats are divided by instead.
* *Rounding to integers* adds 1.5 · 2^23: the sum has no room for a fraction, and its low byte is the code.

The launch forbids the compiler to fuse products and sums by itself (`enable_fp_fusion`). An RMSNorm may come first, in
the same program (`triton.norm`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.triton.fragment import INTERPRET
from bitwright.kernels.triton.gemm import machine, on_device
from bitwright.kernels.triton.norm import inverse_rms, normed, square

SPAN = 512  # columns that a warp takes side by side: 16 a lane, the codes of which are one 16-byte store
WHOLE = 16384  # columns of a token that stay in registers: 32 a lane of 16 warps
_PART = 8192  # columns at a time of tokens longer than that
_FEW = 4  # tokens per multiprocessor up to which latency counts more than throughput
_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23
_MAGIC_BITS = tl.constexpr(0x4B400000)
_NEAR, _FAR = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)  # scales whose quotients stay among normal floats
_INF = tl.constexpr(float("inf"))


@dataclass(frozen=True)
class QuantizeConfig:
    """A program takes warps × repeats × SPAN columns at a time; whole: no token is longer than that."""

    warps: int
    repeats: int
    whole: bool

    @property
    def columns(self) -> int:
        """Columns at a time."""
        return self.warps * self.repeats * SPAN


@lru_cache(maxsize=4096)
def quantize_config(M: int, columns: int, block: int, processors: int) -> QuantizeConfig:
    """How M tokens of so many columns (base columns, padded) are quantized; block: of the rotation.

    Blocks of a rotation stay within a warp. Many tokens: few warps with more to load at once each, so that programs
    share a multiprocessor. Few tokens: as many warps as there are columns for.
    """
    whole = columns <= WHOLE
    spans = triton.next_power_of_2(triton.cdiv(columns if whole else _PART, SPAN))
    per_processor = M / processors
    repeats = max(block // SPAN, 2 if per_processor > _FEW else 1)
    return QuantizeConfig(max(1, spans // repeats), repeats, whole)


def quantize(
    x: Tensor,
    base_idx: Tensor | None,
    outlier_idx: Tensor,
    bits: int,
    block: int,
    clip: float,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    tiles: QuantizeConfig | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> None:
    """Fill `out` = (codes, scale, zero, outliers), allocated as `kernels.split_ops` says, from x [M, K].

    x: float32, bf16 or fp16, columns side by side, rows any distance apart. base_idx int32 [B] or None, outlier_idx
    int32 [O]. tiles: instead of what `quantize_config` chooses. norm: (weight [K] in the dtype of x, eps) of an RMSNorm
    that x goes through first.
    """
    codes, scale, zero, outliers = out
    M, O, device = x.shape[0], outlier_idx.shape[0], x.device
    if M == 0:
        return
    B = x.shape[1] - O if base_idx is None else base_idx.shape[0]
    weight, eps = norm or (None, 0.0)
    c = tiles or quantize_config(M, codes.shape[1], block, machine(device)[1])
    with on_device(device):
        quantize_kernel[(M,)](
            x, weight, base_idx, outlier_idx, codes, scale, zero, outliers, x.stride(0), x.shape[1], B, codes.shape[1],
            O, outliers.shape[1], clip, eps, BITS=bits, BLOCK=block, WIDTH=SPAN, WARPS=c.warps, REPEATS=c.repeats,
            WHOLE=c.whole, OUTLIERS=min(1024, triton.next_power_of_2(outliers.shape[1])) if O else 0,
            FMA=device.type == "cuda", num_warps=c.warps, enable_fp_fusion=False,
        )  # fmt: skip


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
def load_base(
    x, weight, rstd, base_idx, column, B,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """float32: base columns `column` of a token, normalised, then rotated; 0 from B on."""
    inside = column < B
    from_ = column if base_idx is None else tl.load(base_idx + column, mask=inside, other=0)
    y = tl.load(x + from_, mask=inside, other=0.0)
    if weight is not None:
        y = normed(y, rstd, tl.load(weight + from_, mask=inside, other=0.0))
    y = y.to(tl.float32)
    if BLOCK > 1:
        y = rotated(y, BLOCK, WIDTH, WARPS, REPEATS)
    return y


@triton.jit
def _extremes(y, BITS: tl.constexpr):
    """Bits of max(y, 0) and of max(-y, 0), at 8 bits those of |y| in both; NaN is above all of them."""
    bits = y.to(tl.int32, bitcast=True)
    if BITS == 8:
        up = bits & 0x7FFFFFFF
        down = up
    else:
        up = tl.maximum(bits, 0)
        down = tl.maximum(bits ^ (-(2**31)), 0)
    return up, down


@triton.jit
def _quotients(y, scale, FMA: tl.constexpr):
    """y / scale rounded once, where the quotient is no subnormal; one scale for all."""
    if FMA:
        if (scale > _NEAR) & (scale < _FAR):
            r = tl.div_rn(1.0, scale)
            q = y * r
            q = tl.fma(tl.fma(-q, scale, y), r, q)
            q = tl.fma(tl.fma(-q, scale, y), r, q)
        else:
            q = tl.div_rn(y, scale)
    else:
        q = tl.div_rn(y, scale)
    return q


@triton.jit
def grid_of(up, down, clip, BITS: tl.constexpr):
    """(scale, zero point) of a token, float32 and int32, from what `_extremes` gave for all of it."""
    up = up.to(tl.float32, bitcast=True)
    down = down.to(tl.float32, bitcast=True)
    if BITS == 8:
        scale = tl.div_rn(up, 127.0)
        scale = tl.where(scale == 0.0, 1.0, scale)
        zero = 0
    else:
        hi = up * clip
        lo = down * clip
        scale = tl.div_rn(hi + lo, 15.0)
        idle = scale == 0.0
        scale = tl.where(idle, 1.0, scale)
        steps = (tl.div_rn(lo, scale) + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
        zero = tl.where(idle | (scale != scale) | (scale == _INF), 0, steps - 8)
    return scale, zero


@triton.jit
def codes_of(y, scale, zero, BITS: tl.constexpr, FMA: tl.constexpr):
    """int8 codes of y. A token whose scale is NaN or Inf has codes that mean nothing."""
    shifted = _quotients(y, scale, FMA) + _MAGIC
    if BITS == 4:
        shifted = tl.minimum(tl.maximum(shifted + zero.to(tl.float32), _MAGIC - 8.0), _MAGIC + 7.0)
    return shifted.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize_kernel(
    x, weight, base_idx, outlier_idx, codes, scale, zero, outliers, stride, K, B, Bp, O, Op, clip, eps,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, REPEATS: tl.constexpr,
    WHOLE: tl.constexpr, OUTLIERS: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    """Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    x += token * stride
    codes += token * Bp
    AT_ONCE: tl.constexpr = REPEATS * WARPS * WIDTH
    rstd = 1.0
    if weight is not None:
        squares = tl.zeros([WIDTH, WARPS, REPEATS], tl.float32)
        for first in range(0, K, AT_ONCE):
            column = columns_of(first, WIDTH, WARPS, REPEATS)
            squares += square(x, column, K)
        rstd = inverse_rms(tl.sum(tl.reshape(squares, [AT_ONCE]), 0), K, eps)
    if WHOLE:
        column = columns_of(0, WIDTH, WARPS, REPEATS)
        y = load_base(x, weight, rstd, base_idx, column, B, BLOCK, WIDTH, WARPS, REPEATS)
        up, down = _extremes(y, BITS)
    else:
        up = tl.zeros([WIDTH, WARPS, REPEATS], tl.int32)
        down = up
        for first in range(0, Bp, AT_ONCE):
            column = columns_of(first, WIDTH, WARPS, REPEATS)
            y = load_base(x, weight, rstd, base_idx, column, B, BLOCK, WIDTH, WARPS, REPEATS)
            u, d = _extremes(y, BITS)
            up = tl.maximum(up, u)
            down = tl.maximum(down, d)
    up = tl.max(tl.reshape(up, [AT_ONCE]), 0)
    down = tl.max(tl.reshape(down, [AT_ONCE]), 0) if BITS == 4 else up
    s, z = grid_of(up, down, clip, BITS)
    tl.store(scale + token, s)
    tl.store(zero + token, z)
    if WHOLE:
        code = tl.where(column < B, codes_of(y, s, z, BITS, FMA), 0)
        tl.store(codes + column, code, mask=column < Bp)
    else:
        for first in range(0, Bp, AT_ONCE):
            column = columns_of(first, WIDTH, WARPS, REPEATS)
            y = load_base(x, weight, rstd, base_idx, column, B, BLOCK, WIDTH, WARPS, REPEATS)
            code = tl.where(column < B, codes_of(y, s, z, BITS, FMA), 0)
            tl.store(codes + column, code, mask=column < Bp)
    if OUTLIERS:
        outliers += token * Op
        for first in range(0, Op, OUTLIERS):
            o = first + tl.arange(0, OUTLIERS)
            from_ = tl.load(outlier_idx + o, mask=o < O, other=0)
            kept = tl.load(x + from_, mask=o < O, other=0.0)
            if weight is not None:
                kept = normed(kept, rstd, tl.load(weight + from_, mask=o < O, other=0.0))
            tl.store(outliers + o, kept, mask=o < Op)
