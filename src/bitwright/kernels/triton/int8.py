"""Integer products of packed weights and quantized activations, with scales, zero points and outliers in one kernel.

A program multiplies BN rows of the weight with the codes of BM tokens on int8 tensor cores, exactly. 4-bit codes go
from memory through registers into the left operand (`kernels.int8_fragments`), two logic operations for eight codes;
they arrive as 16 · code. 8-bit codes lie in rows and go through shared memory. The sum becomes float32 in the registers
that hold it, in the order of roundings that `reference.split_linear` states, and is the accumulator of a second
product, that of the outliers in 16 bits. With few tokens several programs share the columns of a tile; parts are
integers, so their sum has the same bits in any order.

`enable_fp_fusion=False` at the launch: a multiplication and an addition that became one would skip a rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.triton.config import Config
from bitwright.kernels.triton.fragment import INTERPRET
from bitwright.kernels.triton.gemm import arrive, machine, on_device, order, store
from bitwright.kernels.triton.int8_config import choose, outlier_step
from bitwright.kernels.workspace import zeros

_FINISH_BN, _FINISH_BM = 64, 64  # tile of `finish_kernel`
# Four bytes in a register: what the compiler makes of single ones takes three times as many instructions.
SIXTEENFOLD = tl.constexpr("{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }")


def linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
    bits: int,
    N: int,
    B: int,
    dtype: torch.dtype,
    tiles: Config | None = None,
) -> Tensor:
    """[M, N] in `dtype`; operands as `int8_ops` describes and checks them. tiles: instead of what `choose` gives."""
    M, device = codes.shape[0], codes.device
    out = torch.empty(M, N, dtype=dtype, device=device)
    if M == 0 or N == 0:
        return out
    c = tiles or choose(M, N, B, bits, *machine(device))
    grid = triton.cdiv(N, c.BN) * triton.cdiv(M, c.BM)
    partial = arrived = None
    if c.split_k > 1:
        partial = torch.empty(grid * c.split_k * c.BN * c.BM, dtype=torch.int32, device=device)
        arrived = zeros(grid, device)
    O = outliers.shape[1]
    with on_device(device):
        int8_kernel[(grid, c.split_k)](
            codes, scale, zero, outliers, weight, weight_scale, row_sums, weight_outliers, bias, out, partial, arrived,
            M, N, codes.shape[1], O,
            BITS=bits, BN=c.BN, BM=c.BM, BK=c.BK, OK=outlier_step(O, c.BM), SPLIT=c.split_k > 1, STREAM=c.BM >= M,
            num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def finish(
    sums: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N] in `dtype` of sums int32 [at least N, at least M], rows contiguous, that another product made."""
    M, N, device = scale.shape[0], weight_scale.shape[0], sums.device
    out = torch.empty(M, N, dtype=dtype, device=device)
    if M == 0 or N == 0:
        return out
    O = outliers.shape[1]
    grid = triton.cdiv(N, _FINISH_BN) * triton.cdiv(M, _FINISH_BM)
    with on_device(device):
        finish_kernel[(grid,)](
            sums, scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias, out, M, N, O, sums.stride(0),
            BN=_FINISH_BN, BM=_FINISH_BM, OK=outlier_step(O, _FINISH_BM),
            num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _sixteenfold(b):
    """int8 tensors 16 · code of the low and of the high nibbles of bytes."""
    if INTERPRET:
        low = b << 4
        high = b & -16
    else:
        low, high = tl.inline_asm_elementwise(SIXTEENFOLD, "=r,=r,r", [b], (tl.int8, tl.int8), True, 4)
    return low, high


@triton.jit
def products(
    codes, rows, weight, block_row, N, Bp, first, last,
    BITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """int32 [BN, BM]: BN rows of codes of W from a block row on, times `rows` of codes, over steps first to last of BK.

    BK divides Bp. Rows beyond N repeat the last row (block): the caller drops what comes out.
    """
    NB: tl.constexpr = BN // 16
    KB: tl.constexpr = BK // 64
    POLICY: tl.constexpr = "evict_first" if STREAM else ""
    k = first * BK + tl.arange(0, BK)
    tokens = codes + rows[None, :] * Bp + k[:, None]
    if BITS == 4:
        # Row blocks vary faster than column blocks: neighbouring warps read what they will multiply.
        i = tl.arange(0, NB * KB * 512)
        block = tl.minimum(block_row + i // 512 % NB, tl.cdiv(N, 16) - 1).to(tl.int64) * (Bp // 64)
        block += first * KB + i // (512 * NB)
        at = weight + tl.max_contiguous(block * 512 + i % 512, 16)
        ADVANCE: tl.constexpr = KB * 512
    else:
        n = tl.minimum(block_row * 16 + tl.arange(0, BN), N - 1).to(tl.int64)
        at = weight + n[:, None] * Bp + k[None, :]
        ADVANCE: tl.constexpr = BK
    acc = tl.zeros([BN, BM], tl.int32)
    for _ in range(first, last):
        w = tl.load(at, eviction_policy=POLICY)
        x = tl.load(tokens)
        if BITS == 4:
            low, high = _sixteenfold(w)
            # [KB, NB, g, t, w1, w0, b, half]
            both = tl.join(low, high).reshape([KB, NB, 8, 4, 2, 2, 4, 2])
            w = both.permute((1, 7, 2, 0, 4, 5, 3, 6)).reshape([BN, BK])
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        at += ADVANCE
        tokens += BK
    return acc


@triton.jit
def finished(
    acc, scale, zero, outliers, weight_scale, row_sums, weight_outliers, rows, n, O,
    BM: tl.constexpr, OK: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM] of exact sums acc: scales, zero points and outliers of tokens `rows` and outputs `n`."""
    acc -= tl.load(row_sums + n)[:, None] * tl.load(zero + rows)[None, :]
    y = acc.to(tl.float32) * tl.load(scale + rows)[None, :] * tl.load(weight_scale + n)[:, None]
    if OK > 0:
        o = tl.arange(0, OK)
        w_at = weight_outliers + n.to(tl.int64)[:, None] * O + o[None, :]
        x_at = outliers + rows[None, :] * O + o[:, None]
        for first in range(0, O, OK):
            w = tl.load(w_at, mask=(first + o < O)[None, :], other=0.0)
            x = tl.load(x_at, mask=(first + o < O)[:, None], other=0.0)
            if INTERPRET:
                y += tl.dot(w.to(tl.float32), x.to(tl.float32), input_precision="ieee")
            else:
                y = tl.dot(w, x, y)
            w_at += OK
            x_at += OK
    return y


@triton.jit(do_not_specialize=["M"])
def int8_kernel(
    codes, scale, zero, outliers, weight, weight_scale, row_sums, weight_outliers, bias, out, partial, arrived,
    M, N, Bp, O,
    BITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, OK: tl.constexpr,
    SPLIT: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of [N, M], parts of the base columns."""
    m, tile_n = order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), 16)
    block_row = tile_n * (BN // 16)
    row = m * BM + tl.arange(0, BM)
    rows = tl.minimum(row, M - 1).to(tl.int64)
    n = tl.minimum(tile_n * BN + tl.arange(0, BN), N - 1)
    steps = Bp // BK
    if SPLIT:
        share = tl.cdiv(steps, tl.num_programs(1))
        first = tl.minimum(tl.program_id(1) * share, steps)
        last = tl.minimum(first + share, steps)
    else:
        first = 0
        last = steps
    acc = products(codes, rows, weight, block_row, N, Bp, first, last, BITS, BN, BM, BK, STREAM)
    complete = True
    if SPLIT:
        complete, acc = arrive(acc, partial, arrived, tl.program_id(0), BN, BM)
    if complete:
        if BITS == 4:
            acc = acc >> 4  # a sum of 16 · code: nothing is lost
        y = finished(acc, scale, zero, outliers, weight_scale, row_sums, weight_outliers, rows, n, O, BM, OK)
        store(y, out, rows, row < M, bias, block_row, N, BN)


@triton.jit(do_not_specialize=["M", "stride"])
def finish_kernel(
    sums, scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias, out, M, N, O, stride,
    BN: tl.constexpr, BM: tl.constexpr, OK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of [N, M]. sums int32 [N, stride]."""
    m, tile_n = order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), 16)
    row = m * BM + tl.arange(0, BM)
    rows = tl.minimum(row, M - 1).to(tl.int64)
    n = tl.minimum(tile_n * BN + tl.arange(0, BN), N - 1)
    acc = tl.load(sums + n.to(tl.int64)[:, None] * stride + rows[None, :])
    y = finished(acc, scale, zero, outliers, weight_scale, row_sums, weight_outliers, rows, n, O, BM, OK)
    store(y, out, rows, row < M, bias, tile_n * (BN // 16), N, BN)
