"""Expert layers: tokens sorted by expert, every expert's rows times its own weight, in one launch.

The host knows how many tokens there are, not how they fall. The grid has a slot for every tile that could be needed;
a program counts on the device, from `offsets`, which expert and which of its tokens its slot stands for, and slots left
over end at once. So nothing waits for the host, and a captured launch serves any routing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels.fragments import Fragments
from bitwright.kernels.machine import machine
from bitwright.kernels.triton.config import Config, expert_config, max_tiles
from bitwright.kernels.triton.gemm import accumulate, arrive, check, has_asm, on_device, order, share, store
from bitwright.kernels.workspace import zeros


def linear(
    x: Tensor, offsets: Tensor, fragments: Fragments, tiles: Config | None = None, settled: bool = False
) -> Tensor:
    """x [T, K] sorted by expert times a stack of E weights [N, K] -> [T, N] in the dtype of x.

    offsets: int32 [E + 1] on the device; rows offsets[e] to offsets[e + 1] - 1 belong to expert e. Rows of the result
    from offsets[E] on are whatever was in memory. tiles: instead of what `expert_config` chooses. settled: nothing to
    gain here, since no program begins before all earlier kernels are done. Raises SchemeError for dtypes, groups and
    offsets the kernel does not know.
    """
    f = fragments
    T, device = x.shape[0], x.device
    group = check(x, f)
    E = f.experts
    if E is None or offsets.dtype != torch.int32 or tuple(offsets.shape) != (E + 1,):
        raise SchemeError(
            f"offsets are {offsets.dtype} {list(offsets.shape)} for {'one weight' if E is None else f'{E} experts'}; "
            "a stack of E experts needs int32 [E + 1]"
        )
    out = torch.empty(T, f.N, dtype=x.dtype, device=device)
    if T == 0 or f.N == 0 or E == 0:
        return out
    c = tiles or expert_config(T, E, f.N, f.K, f.bits, *machine(device))
    grid = triton.cdiv(f.N, c.BN) * max_tiles(T, E, c.BM)
    partial = arrived = None
    if c.split_k > 1:
        partial = torch.empty(grid * c.split_k * c.BN * c.BM, dtype=torch.float32, device=device)
        arrived = zeros(grid, device)
    with on_device(device):
        experts_kernel[(grid, c.split_k)](
            x.contiguous(), offsets, f.words[0], f.words[-1], f.scale, f.zero, out, partial, arrived, E, f.N, f.K,
            BITS=f.bits, GROUP=group, BN=c.BN, BM=c.BM, BK=c.BK, EXPERTS=triton.next_power_of_2(E),
            SPLIT=c.split_k > 1, EVEN=f.K % c.BK == 0, ASM=has_asm(device, x.dtype),
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return out


@triton.jit
def find(offsets, slot, E, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, tile of BM tokens within it) of a slot; the expert is E or more for a slot that is left over."""
    e = tl.arange(0, EXPERTS)
    start = tl.load(offsets + e, mask=e < E, other=0)
    end = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles = (end - start + BM - 1) // BM
    done = tl.cumsum(tiles)
    passed = ((done <= slot) & (e < E)).to(tl.int32)
    return tl.sum(passed), slot - tl.sum(tiles * passed)


@triton.jit
def experts_kernel(
    x, offsets, words, plane, scale, zero, out, partial, arrived, E, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    EXPERTS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid: slots × tiles of N, parts of K."""
    down = tl.num_programs(0) // tl.cdiv(N, BN)
    slot, n = order(tl.program_id(0), down, tl.cdiv(N, BN), 8)
    expert, m = find(offsets, slot, E, BM, EXPERTS)
    if expert < E:
        end = tl.load(offsets + expert + 1)
        row = tl.load(offsets + expert) + m * BM + tl.arange(0, BM)
        rows = tl.minimum(row, end - 1).to(tl.int64)
        blocks = tl.cdiv(N, 64) * 4
        block = expert.to(tl.int64) * blocks * tl.cdiv(K, 64)
        PER_BLOCK: tl.constexpr = 64 if BITS == 3 else 32 * BITS
        groups = 1 if GROUP == 0 else tl.cdiv(K, GROUP)
        of_scale = expert.to(tl.int64) * groups * blocks * 16
        if zero is not None:
            zero += of_scale
        steps = tl.cdiv(K, BK)
        first, last = share(steps, SPLIT)
        acc = accumulate(
            x, rows, words + block * PER_BLOCK, plane + block * 32, scale + of_scale, zero, n * (BN // 16), N, K,
            first, last, BITS, GROUP, BN, BM, BK, False, EVEN, ASM,
        )  # fmt: skip
        if SPLIT:
            complete, acc = arrive(acc, partial, arrived, tl.program_id(0), BN, BM)
            if complete:
                store(acc, out, rows, row < end, None, n * (BN // 16), N, N, BN)
        else:
            store(acc, out, rows, row < end, None, n * (BN // 16), N, N, BN)
