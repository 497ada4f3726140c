"""Integer products of packed weights and quantized activations, with scales, zero points and outliers in one kernel.

A program multiplies BN rows of the weight with the codes of BM tokens on int8 tensor cores, exactly. 4-bit codes go
from memory through registers into the left operand (`kernels.int8_fragments`), two logic operations for eight codes;
they arrive as 16 · code. 8-bit codes lie in rows and go through shared memory. The sum becomes float32 in the registers
that hold it, in the order of roundings that `reference.split_linear` states, and is the accumulator of a second
product, that of the outliers in 16 bits. With few tokens several programs share the columns of a tile, base columns
first and then outliers, which are as much to read: each leaves its parts in memory, integers and floats apart, and the
one that arrives last adds them up, floats in their order, so the result does not depend on who was last.

`enable_fp_fusion=False` at the launch: a multiplication and an addition that became one would skip a rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.machine import machine
from bitwright.kernels.triton.config import Config
from bitwright.kernels.triton.fragment import INTERPRET
from bitwright.kernels.triton.gemm import on_device, order, store
from bitwright.kernels.triton.int8_config import choose, choose_end, outlier_step
from bitwright.kernels.workspace import zeros

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
    O = outliers.shape[1]
    c = tiles or choose(M, N, B, O, bits, *machine(device))
    grid = triton.cdiv(N, c.BN) * triton.cdiv(M, c.BM)
    sums = outlier_sums = arrived = None
    if c.split_k > 1:
        count = grid * c.split_k * c.BN * c.BM
        sums = torch.empty(count, dtype=torch.int32, device=device)
        outlier_sums = torch.empty(count, dtype=torch.float32, device=device) if O else None
        arrived = zeros(grid, device)
    with on_device(device):
        int8_kernel[(grid, c.split_k)](
            codes, scale, zero, outliers, weight, weight_scale, row_sums, weight_outliers, bias, out,
            sums, outlier_sums, arrived, M, N, codes.shape[1], O,
            BITS=bits, BN=c.BN, BM=c.BM, BK=c.BK, OK=outlier_step(O, c.BM), SPLIT=c.split_k > 1, STREAM=c.BM >= M,
            num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def finish(
    out: Tensor,
    sums: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
    tiles: Config | None = None,
) -> None:
    """out [M, N], columns contiguous, of sums int32 [at least N, at least M], likewise, that another product made.

    tiles: instead of what `choose_end` gives.
    """
    (M, N), O = out.shape, outliers.shape[1]
    if M == 0 or N == 0:
        return
    c = tiles or choose_end(M, N, O)
    grid = triton.cdiv(N, c.BN) * triton.cdiv(M, c.BM)
    with on_device(out.device):
        finish_kernel[(grid,)](
            sums, scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias, out, M, N, O,
            sums.shape[1], sums.stride(0), out.stride(0), BN=c.BN, BM=c.BM, OK=c.BK if O else 0,
            num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=False,
        )  # fmt: skip


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
def scaled(acc, scale, zero, weight_scale, row_sums, rows, n):
    """float32 [BN, BM] of exact sums acc: zero points and scales of tokens `rows` and outputs `n`."""
    acc -= tl.load(row_sums + n)[:, None] * tl.load(zero + rows)[None, :]
    return acc.to(tl.float32) * tl.load(scale + rows)[None, :] * tl.load(weight_scale + n)[:, None]


@triton.jit
def add_outliers(y, outliers, weight_outliers, rows, n, O, first, last, OK: tl.constexpr):
    """y [BN, BM] plus the product of outliers over steps first to last of OK columns."""
    o = first * OK + tl.arange(0, OK)
    w_at = weight_outliers + n.to(tl.int64)[:, None] * O + o[None, :]
    x_at = outliers + rows[None, :] * O + o[:, None]
    for step in range(first, last):
        inside = step * OK + tl.arange(0, OK) < O
        w = tl.load(w_at, mask=inside[None, :], other=0.0)
        x = tl.load(x_at, mask=inside[:, None], other=0.0)
        if INTERPRET:
            y += tl.dot(w.to(tl.float32), x.to(tl.float32), input_precision="ieee")
        else:
            y = tl.dot(w, x, y)
        w_at += OK
        x_at += OK
    return y


@triton.jit(do_not_specialize=["M"])
def int8_kernel(
    codes, scale, zero, outliers, weight, weight_scale, row_sums, weight_outliers, bias, out,
    sums, outlier_sums, arrived, M, N, Bp, O,
    BITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, OK: tl.constexpr,
    SPLIT: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of [N, M], parts of the columns. OK: outliers a step, 0 where there are none."""
    tile = tl.program_id(0)
    m, tile_n = order(tile, tl.cdiv(M, BM), tl.cdiv(N, BN), 16)
    block_row = tile_n * (BN // 16)
    row = m * BM + tl.arange(0, BM)
    rows = tl.minimum(row, M - 1).to(tl.int64)
    n = tl.minimum(tile_n * BN + tl.arange(0, BN), N - 1)
    base = Bp // BK  # steps over base columns, before those over outliers
    steps = base
    if OK > 0:
        steps += tl.cdiv(O, OK)
    if SPLIT:
        split = tl.num_programs(1)
        share = tl.cdiv(steps, split)
        first = tl.minimum(tl.program_id(1) * share, steps)
        last = tl.minimum(first + share, steps)
        at = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        parts = tile.to(tl.int64) * split * (BN * BM)
        mine = parts + tl.program_id(1) * (BN * BM)
        if OK > 0:  # noqa: SIM102, a constant: what is under it is not compiled where there are no outliers
            if last > base:
                begin = tl.maximum(first, base) - base
                y = tl.zeros([BN, BM], tl.float32)
                y = add_outliers(y, outliers, weight_outliers, rows, n, O, begin, last - base, OK)
                tl.store(outlier_sums + mine + at, y)
        if first < base:
            end = tl.minimum(last, base)
            acc = products(codes, rows, weight, block_row, N, Bp, first, end, BITS, BN, BM, BK, STREAM)
            tl.store(sums + mine + at, acc)
        tl.debug_barrier()  # every thread has written before one of them says so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == split - 1:
            acc = tl.zeros([BN, BM], tl.int32)
            for i in range(0, tl.cdiv(base, share)):
                acc += tl.load(sums + parts + i * (BN * BM) + at, cache_modifier=".cg")
            if BITS == 4:
                acc = acc >> 4  # a sum of 16 · code: nothing is lost
            y = scaled(acc, scale, zero, weight_scale, row_sums, rows, n)
            if OK > 0:
                for i in range(base // share, tl.cdiv(steps, share)):
                    y += tl.load(outlier_sums + parts + i * (BN * BM) + at, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
            store(y, out, rows, row < M, bias, block_row, N, N, BN)
    else:
        acc = products(codes, rows, weight, block_row, N, Bp, 0, base, BITS, BN, BM, BK, STREAM)
        if BITS == 4:
            acc = acc >> 4
        y = scaled(acc, scale, zero, weight_scale, row_sums, rows, n)
        if OK > 0:
            y = add_outliers(y, outliers, weight_outliers, rows, n, O, 0, steps - base, OK)
        store(y, out, rows, row < M, bias, block_row, N, N, BN)


@triton.jit(do_not_specialize=["M"])
def finish_kernel(
    sums, scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias, out, M, N, O,
    columns, sums_stride, out_stride,
    BN: tl.constexpr, BM: tl.constexpr, OK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of [N, M]. sums int32 [N or more, columns], M of them or more."""
    m, tile_n = order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), 16)
    row = m * BM + tl.arange(0, BM)
    rows = tl.minimum(row, M - 1).to(tl.int64)
    n = tl.minimum(tile_n * BN + tl.arange(0, BN), N - 1)
    # Up to the padding that is there, not to M: a bound of 16 or 32 tokens at a time lets a lane load several at once.
    at = sums + n.to(tl.int64)[:, None] * sums_stride + row[None, :]
    acc = tl.load(at, mask=(row < columns)[None, :], other=0)
    y = scaled(acc, scale, zero, weight_scale, row_sums, rows, n)
    if OK > 0:
        y = add_outliers(y, outliers, weight_outliers, rows, n, O, 0, tl.cdiv(O, OK), OK)
    store(y, out, rows, row < M, bias, tile_n * (BN // 16), N, out_stride, BN)
