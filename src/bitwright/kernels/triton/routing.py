"""Tokens sorted by expert: few choices, each compared with all others, in one launch.

The place of a choice is the number of those before it in the order of experts, then of their own: no program needs
what another one finds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.triton.gemm import on_device


def sort(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `routing_ops.sort_by_expert`; index [M, k] contiguous, not empty, its choices at most some thousand."""
    count, device = index.numel(), index.device
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    tokens, places = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    block = 8
    with on_device(device):
        sort_kernel[(triton.cdiv(max(count, experts + 1), block),)](
            index, offsets, tokens, places, count, index.shape[1], experts,
            BLOCK=block, COUNT=max(32, triton.next_power_of_2(count)), num_warps=4,
        )  # fmt: skip
    return offsets, tokens, places


@triton.jit
def sort_kernel(
    index, offsets, tokens, places, count, k, experts, BLOCK: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """BLOCK choices, and as many offsets, a program."""
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, COUNT)
    there = (c < count)[None, :]
    others = tl.load(index + c, mask=c < count, other=0)[None, :]
    expert = tl.load(index + mine, mask=mine < count, other=0)[:, None]
    before = (others < expert) | ((others == expert) & (c[None, :] < mine[:, None]))
    place = tl.sum((before & there).to(tl.int32), 1)
    tl.store(tokens + place, (mine // k).to(tl.int64), mask=mine < count)
    tl.store(places + mine, place.to(tl.int64), mask=mine < count)
    begin = tl.sum(((others < mine[:, None]) & there).to(tl.int32), 1)
    tl.store(offsets + mine, begin, mask=mine <= experts)
