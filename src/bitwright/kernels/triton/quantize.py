"""Activations become integer codes and 16-bit outliers (`bitwright.activations`), in one kernel and one pass.

One program per token. It gathers the base columns in their stored order, by way of shared memory where the token is
short, rotates them, takes the largest and smallest value, and writes codes, scale and zero point; outliers are copied.
Otherwise nothing but the two extremes crosses the borders of a warp, so a token of up to `WHOLE` columns is read once
and stays in registers. A longer one is read twice, the second time from L2.

Every bit is that of `bitwright.activations`: extremes do not depend on an order, sums of a rotation are those of its
butterflies, and what is rounded is rounded once. Three things make it so:

* *Extremes* are taken of bit patterns: those of floats that are not negative compare like integers, and NaN lies above
  Inf, so that it is found like any other number, which a float maximum of the GPU would pass over.
* *x / scale* is a division by one number for a whole token, so its reciprocal r is computed once. q = x r, twice
  corrected with q += (x - q scale) r in fused operations, is the quotient rounded once: the first leaves q within one
  unit in the last place, and from there the second is exact (Markstein, IBM J. Res. Dev. 34(1), 1990, for a correctly
  rounded r). Scales so small or large that something would leave the range of normal floats are divided by instead.
* *Rounding to integers* adds 1.5 · 2^23: the sum has no room for a fraction, and its low byte is the code.

The launch forbids the compiler to fuse products and sums by itself (`enable_fp_fusion`). What comes first may be in the
same program: an RMSNorm, that of a sum, or silu(gate) · up (`columns`, `norm`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.machine import machine
from bitwright.kernels.triton.columns import columns_of, gated, load_base, load_columns
from bitwright.kernels.triton.gemm import on_device
from bitwright.kernels.triton.norm import added, inverse_rms, normed

SPAN = 512  # columns of a warp with 16 a lane
WHOLE = 16384  # columns of a token that stay in registers: 32 a lane of 16 warps
_PART = 8192  # columns at a time of tokens longer than that
_WARPS = 32  # of a program at most
_FEW = 4  # tokens per multiprocessor up to which latency counts more than throughput
_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23
_MAGIC_BITS = tl.constexpr(0x4B400000)
_NEAR, _FAR = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)  # scales whose quotients stay among normal floats
_INF = tl.constexpr(float("inf"))


@dataclass(frozen=True)
class QuantizeConfig:
    """A program takes `columns` at a time; whole: no token is longer than that.

    lane: columns that a lane takes side by side, 16 or 4, whose codes are one store. A load of one gathered column by
    each lane of a warp touches as many lines of 128 bytes as the lanes' columns spread over: 8 of bf16 if every lane
    has 16 columns, 2 if it has 4, and passes the cache as often. Columns in the order of the input are loaded 16 bytes
    at a time, and 16 are best. repeats: of `lane`. shared: a whole token, outliers too, is loaded in its order, and
    gathered from shared memory.
    """

    warps: int
    repeats: int
    whole: bool
    lane: int = 16
    shared: bool = False

    @property
    def columns(self) -> int:
        """Columns at a time."""
        return self.warps * self.repeats * self.lane * 32


@lru_cache(maxsize=4096)
def quantize_config(
    M: int, columns: int, block: int, processors: int, gather: bool = False, silu: bool = False
) -> QuantizeConfig:
    """How M tokens of so many columns are quantized: base columns, padded; all columns where `gather`, without a
    rotation. block: of the rotation; gather: columns are stored in another order than those of the input; silu: each is
    a product.

    Blocks of a rotation stay within a warp. Many tokens: few warps with more to load at once each, so that programs
    share a multiprocessor. Few tokens: as many warps as there are columns for. Long tokens are loaded twice, which was
    faster than any way to keep them (dev/LOG.md).
    """
    apart = gather and not block
    whole = columns <= WHOLE
    spans = triton.next_power_of_2(triton.cdiv(columns if whole else _PART, SPAN))
    shared = apart and whole  # 64 KiB of float32 at most
    few = M / processors <= _FEW or (silu and not whole)  # two loads a column are enough at once
    repeats = max(block // SPAN, 1 if few else 2, spans // _WARPS)
    lane = 4 if apart else 16
    return QuantizeConfig(max(1, spans // repeats), repeats * 16 // lane, whole, lane, shared)


class Norm(NamedTuple):
    """An RMSNorm: weight [K] in the dtype of x (None: no norm). once: rounded behind the weight alone, and not before
    it (`norm.normed`).

    residual, total [M, K]: residual + x is stored in `total`, and its norm is taken; all of them contiguous.
    """

    weight: Tensor | None = None
    eps: float = 0.0
    once: bool = False
    residual: Tensor | None = None
    total: Tensor | None = None


def quantize(
    x: Tensor,
    base_idx: Tensor | None,
    outlier_idx: Tensor,
    bits: int,
    block: int,
    clip: float,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    tiles: QuantizeConfig | None = None,
    norm: Mapping[str, Any] | None = None,
    silu: bool = False,
) -> None:
    """Fill `out` = (codes, scale, zero, outliers), allocated as `kernels.split_ops` says, from x [M, K].

    x: float32, bf16 or fp16, columns side by side, rows any distance apart. base_idx int32 [B] or None, outlier_idx
    int32 [O]. tiles: instead of what `quantize_config` chooses. norm: fields of a `Norm` that x goes through first.
    silu: x is [M, 2 K], gates and what they are multiplied with, and silu(gate) · up is quantized.
    """
    codes, scale, zero, outliers = out
    M, O, device = x.shape[0], outlier_idx.shape[0], x.device
    if M == 0:
        return
    K = x.shape[1] // 2 if silu else x.shape[1]
    B = K - O if base_idx is None else base_idx.shape[0]
    n = Norm(**(norm or {}))
    gather, columns = base_idx is not None, codes.shape[1]
    columns = max(columns, K) if gather and not block else columns
    c = tiles or quantize_config(M, columns, block, machine(device)[1], gather, silu)
    # Promised to the compiler, which believes it: rows begin where as many columns as a lane has are aligned.
    aligned = K % c.lane == 0 and x.stride(0) % c.lane == 0
    aligned = aligned and all(t is None or t.data_ptr() % 16 == 0 for t in (x, n.weight, n.residual, n.total))
    with on_device(device):
        quantize_kernel[(M,)](
            x, n.residual, n.total, n.weight, base_idx, outlier_idx, codes, scale, zero, outliers, x.stride(0), K, B,
            codes.shape[1], O, outliers.shape[1], clip, n.eps, SILU=silu, ONCE=n.once, BITS=bits, BLOCK=block,
            LANE=c.lane, WARPS=c.warps, REPEATS=c.repeats, WHOLE=c.whole, SHARED=c.shared, ALIGNED=aligned,
            OUTLIERS=min(1024, triton.next_power_of_2(outliers.shape[1])) if O else 0,
            FMA=device.type == "cuda", num_warps=c.warps, enable_fp_fusion=False,
        )  # fmt: skip


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
    x, residual, total, weight, base_idx, outlier_idx, codes, scale, zero, outliers, stride, K, B, Bp, O, Op, clip, eps,
    SILU: tl.constexpr, ONCE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
    WARPS: tl.constexpr, REPEATS: tl.constexpr, WHOLE: tl.constexpr, SHARED: tl.constexpr,
    ALIGNED: tl.constexpr, OUTLIERS: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    """Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = LANE * 32
    AT_ONCE: tl.constexpr = REPEATS * WARPS * WIDTH
    x += token * stride
    codes = tl.multiple_of(codes + token * Bp, LANE)  # so many bytes a store, so many columns a lane
    rstd = 1.0
    if residual is not None:
        residual += token * stride
        total += token * stride
    if SHARED:
        # A lane loads LANE columns side by side and not as many as 16 bytes hold, so that all lies as the codes do.
        SIZE: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
        BYTES: tl.constexpr = LANE * SIZE if ALIGNED else SIZE
        column = tl.arange(0, AT_ONCE)
        row = tl.load(tl.multiple_of(x + column, BYTES), mask=column < K, other=0.0)
        if SILU:
            up = tl.load(tl.multiple_of(x + K + column, BYTES), mask=column < K, other=0.0)
            row = gated(row, up).to(row.dtype)
        if weight is not None:
            if residual is not None:
                row = added(
                    row, tl.multiple_of(residual + column, BYTES), tl.multiple_of(total + column, BYTES), column < K
                )
            wide = row.to(tl.float32)
            rstd = inverse_rms(tl.sum(wide * wide, 0), K, eps)
            gain = tl.load(tl.multiple_of(weight + column, BYTES), mask=column < K, other=0.0)
            row = normed(row, rstd, gain, ONCE).to(row.dtype)
    elif weight is not None:
        squares = tl.zeros([AT_ONCE], tl.float32)
        for first in range(0, K, AT_ONCE):
            column = first + tl.arange(0, AT_ONCE)
            h = tl.load(x + column, mask=column < K, other=0.0)
            if residual is not None:
                h = added(h, residual + column, total + column, column < K)
            wide = h.to(tl.float32)
            squares += wide * wide
        rstd = inverse_rms(tl.sum(squares, 0), K, eps)
    if residual is not None:
        tl.debug_barrier()  # other threads of this program read what one has stored
        x = total
    if SHARED:
        stored = tl.load(base_idx + column, mask=column < B, other=0)
        y = tl.where(column < B, tl.gather(row, stored, 0), 0.0).to(tl.float32)
        up, down = _extremes(y, BITS)
    elif WHOLE:
        column = columns_of(0, WIDTH, WARPS, REPEATS)
        y = load_base(x, weight, rstd, base_idx, K, column, B, SILU, ONCE, BLOCK, WIDTH, WARPS, REPEATS)
        up, down = _extremes(y, BITS)
    else:
        up = tl.zeros([WIDTH, WARPS, REPEATS], tl.int32)
        down = up
        for first in range(0, Bp, AT_ONCE):
            column = columns_of(first, WIDTH, WARPS, REPEATS)
            y = load_base(x, weight, rstd, base_idx, K, column, B, SILU, ONCE, BLOCK, WIDTH, WARPS, REPEATS)
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
            y = load_base(x, weight, rstd, base_idx, K, column, B, SILU, ONCE, BLOCK, WIDTH, WARPS, REPEATS)
            code = tl.where(column < B, codes_of(y, s, z, BITS, FMA), 0)
            tl.store(codes + column, code, mask=column < Bp)
    if OUTLIERS:
        outliers += token * Op
        for first in range(0, Op, OUTLIERS):
            o = first + tl.arange(0, OUTLIERS)
            from_ = tl.load(outlier_idx + o, mask=o < O, other=0)
            kept = load_columns(x, weight, rstd, K, from_, o < O, SILU, ONCE)
            tl.store(outliers + o, kept.to(outliers.dtype.element_ty), mask=o < Op)
