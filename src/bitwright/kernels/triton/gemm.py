"""y = x Wᵀ + bias with W in fragment order: one kernel from one token to thousands.

A program unpacks BN rows of W step by step into the registers of the tensor cores' left operand and multiplies them
with BM tokens, which come through shared memory. With few tokens several programs share the K of a tile: each writes
its part in float32, and the one that arrives last adds all parts up in their order, so the result does not depend on
who was last. Sums are in float32 and rounded once, after the bias.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels.fragments import Fragments
from bitwright.kernels.machine import machine
from bitwright.kernels.triton.config import Config, config
from bitwright.kernels.triton.fragment import INTERPRET, load_groups, load_words, rounded, weights
from bitwright.kernels.workspace import zeros

DTYPES = (torch.bfloat16, torch.float16)


def linear(x: Tensor, fragments: Fragments, bias: Tensor | None = None, tiles: Config | None = None) -> Tensor:
    """x [M, K] bf16 or fp16, W [N, K], bias [N] or None -> [M, N] in the dtype of x.

    tiles: instead of what `config` chooses. Raises SchemeError for dtypes and groups the kernel does not know.
    """
    f = fragments
    M, device = x.shape[0], x.device
    group = check(x, f)
    out = torch.empty(M, f.N, dtype=x.dtype, device=device)
    if M == 0 or f.N == 0:
        return out
    c = tiles or config(M, f.N, f.K, f.bits, *machine(device))
    grid = triton.cdiv(f.N, c.BN) * triton.cdiv(M, c.BM)
    partial = arrived = None
    if c.split_k > 1:
        partial = torch.empty(grid * c.split_k * c.BN * c.BM, dtype=torch.float32, device=device)
        arrived = zeros(grid, device)
    with on_device(device):
        linear_kernel[(grid, c.split_k)](
            x.contiguous(), f.words[0], f.words[-1], f.scale, f.zero, bias, out, partial, arrived, M, f.N, f.K,
            BITS=f.bits, GROUP=group, BN=c.BN, BM=c.BM, BK=c.BK, SPLIT=c.split_k > 1, STREAM=c.BM >= M,
            EVEN=f.K % c.BK == 0, ASM=has_asm(device, x.dtype), num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return out


def check(x: Tensor, fragments: Fragments) -> int:
    """GROUP of the kernels: inputs per scale, 0 for one scale per row; SchemeError for what they do not know."""
    if x.dtype not in DTYPES:
        raise SchemeError(f"the Triton kernels multiply bfloat16 and float16, not {x.dtype}; cast the activations")
    if fragments.scale.dtype not in (x.dtype, torch.float32):
        raise SchemeError(
            f"scales are {fragments.scale.dtype} and activations {x.dtype}: pack the weight for {x.dtype} activations"
        )
    if x.ndim != 2 or x.shape[1] != fragments.K:
        raise SchemeError(f"activations are {list(x.shape)}; a weight [N, {fragments.K}] needs [M, {fragments.K}]")
    return group_of(fragments)


def group_of(fragments: Fragments) -> int:
    """group_size as the kernels take it: 0 for one scale per row."""
    if fragments.group_size >= fragments.K:
        return 0
    if fragments.group_size % 32:
        raise SchemeError(
            f"group size {fragments.group_size} is not a multiple of 32, which the Triton kernels need; "
            "dequantize the weight instead"
        )
    return fragments.group_size


@cache
def has_asm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the GPU has fma on pairs of `dtype` under the names PTX gives them."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return machine(device)[0] >= ((8, 0) if dtype == torch.bfloat16 else (5, 3))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it `device`."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@triton.jit
def accumulate(
    x, rows, words, plane, scale, zero, block_row, N, K, first, last,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    STREAM: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: BN rows of W from a block row on, times `rows` of x, over steps first to last of BK."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    PER_BLOCK: tl.constexpr = 64 if BITS == 3 else 32 * BITS
    blocks = tl.cdiv(N, 64) * 4
    columns = tl.cdiv(K, 64)
    groups = 1 if GROUP == 0 else tl.cdiv(K, GROUP)
    s0, s1 = load_groups(scale, block_row, first * (BK // 64), blocks, groups, BN, BK, GROUP)
    z0 = None
    z1 = None
    if zero is not None:
        z0, z1 = load_groups(zero, block_row, first * (BK // 64), blocks, groups, BN, BK, GROUP)
    acc = tl.zeros([BN, BM], tl.float32)
    tokens = x + rows[None, :] * K
    for step in range(first, last):
        col = step * (BK // 64)
        w = load_words(words, block_row, col, blocks, columns, BN, BK, PER_BLOCK, STREAM)
        v = w
        if BITS == 3:
            v = load_words(plane, block_row, col, blocks, columns, BN, BK, 32, STREAM)
        k = step * BK + tl.arange(0, BK)
        t = tl.load(tokens + k[:, None]) if EVEN else tl.load(tokens + k[:, None], mask=(k < K)[:, None], other=0.0)
        tile = weights(w, v, s0, s1, z0, z1, BITS, DTYPE, ASM)
        if GROUP != 0:
            # Scales are too small for an asynchronous copy; those of the next step are fetched a step ahead.
            s0, s1 = load_groups(scale, block_row, col + BK // 64, blocks, groups, BN, BK, GROUP)
            if zero is not None:
                z0, z1 = load_groups(zero, block_row, col + BK // 64, blocks, groups, BN, BK, GROUP)
        if INTERPRET:
            acc += tl.dot(tile.to(tl.float32), t.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(tile, t, acc)
            if ASM:
                acc = finished(acc)
    return acc


@triton.jit
def finished(acc):
    """acc, by no instruction: a use of a sum before the loop goes on makes Triton wait for the products in it.

    On Hopper a product runs on while it reads its left operand from registers, which PTX forbids to change until a
    wait (`wgmma.mma_async`). Left to itself, Triton 3.6 waits for the products of one step within the next, after that
    has begun to unpack its weights into the same registers.
    """
    return tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, True, 1)


@triton.jit
def arrive(acc, partial, arrived, tile, BN: tl.constexpr, BM: tl.constexpr):
    """Leave a part of an output tile. (True, the sum of all parts in their order) for the last to come."""
    split = tl.num_programs(1)
    at = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    parts = partial + tile.to(tl.int64) * split * (BN * BM)
    tl.store(parts + tl.program_id(1) * (BN * BM) + at, acc)
    tl.debug_barrier()  # every thread has written before one of them says so
    last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == split - 1
    if last:
        acc = tl.zeros([BN, BM], tl.float32)
        for i in range(split):
            acc += tl.load(parts + i * (BN * BM) + at, cache_modifier=".cg")
        tl.store(arrived + tile, 0)
    return last, acc


@triton.jit
def store(acc, out, rows, valid, bias, block_row, N, stride, BN: tl.constexpr):
    """Round acc [BN, BM], plus the bias, into rows of out [.., N], `stride` apart, where valid."""
    n = block_row * 16 + tl.arange(0, BN)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y = rounded(acc, out.dtype.element_ty)
    tl.store(out + rows[None, :] * stride + n[:, None], y, mask=(n < N)[:, None] & valid[None, :])


@triton.jit
def order(program, down, across, SPAN: tl.constexpr):
    """Place (down, across) of a program: stripes of SPAN rows, walked row first, so that both operands stay in L2."""
    stripe = program // (SPAN * across)
    height = tl.minimum(down - stripe * SPAN, SPAN)
    inside = program % (SPAN * across)
    return stripe * SPAN + inside % height, inside // height


@triton.jit
def share(steps, SPLIT: tl.constexpr):
    """(first, last): which of a tile's steps this program takes. SPLIT: the grid's second axis shares them."""
    if SPLIT:
        each = tl.cdiv(steps, tl.num_programs(1))
        first = tl.minimum(tl.program_id(1) * each, steps)
        last = tl.minimum(first + each, steps)
    else:
        first = 0
        last = steps
    return first, last


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, words, plane, scale, zero, bias, out, partial, arrived, M, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, STREAM: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of [N, M], parts of K."""
    m, n = order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), 16)
    block_row = n * (BN // 16)
    row = m * BM + tl.arange(0, BM)
    rows = tl.minimum(row, M - 1).to(tl.int64)
    steps = tl.cdiv(K, BK)
    first, last = share(steps, SPLIT)
    acc = accumulate(
        x, rows, words, plane, scale, zero, block_row, N, K, first, last, BITS, GROUP, BN, BM, BK, STREAM, EVEN, ASM
    )
    if SPLIT:
        complete, acc = arrive(acc, partial, arrived, tl.program_id(0), BN, BM)
        if complete:
            store(acc, out, rows, row < M, bias, block_row, N, N, BN)
    else:
        store(acc, out, rows, row < M, bias, block_row, N, N, BN)
