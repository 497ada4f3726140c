"""Triton kernels around the experts of a layer: which of many tokens goes where, and 16-bit experts for few rows.

Torch needs about ten launches to route a handful of tokens; a decoding step has no time for them. One program does it
here: a token goes to an expert at most once, so the place of a token among those of its expert is a column sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels import dependent
from bitwright.kernels.dependent import release, wait

MAX_TOKENS = 1024  # of `route`: one program holds tokens x experts


@triton.jit
def _route(
    logits,
    offsets,
    tokens,
    places,
    shares,
    M,
    E: tl.constexpr,
    TOP: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    m = tl.arange(0, BM)
    e = tl.arange(0, BE)
    inside = (m < M)[:, None] & (e < E)[None, :]
    left = tl.load(logits + m[:, None] * E + e[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    left = tl.where((e < E)[None, :] & (m >= M)[:, None], 0.0, left)  # rows beyond M: any finite value
    chosen = tl.zeros([BM, BE], tl.int32)
    best = tl.max(left, 1)
    total = tl.zeros([BM], tl.float32)
    for j in tl.static_range(TOP):
        top = tl.max(left, 1)
        expert = tl.argmax(left, 1)
        pick = e[None, :] == expert[:, None]
        chosen += tl.where(pick & (m < M)[:, None], 1, 0)
        left = tl.where(pick, float("-inf"), left)
        share = tl.exp(top - best)
        total += share
        tl.store(places + m * TOP + j, expert, mask=m < M)  # the expert for now, its row below
        tl.store(shares + m * TOP + j, share, mask=m < M)
    count = tl.sum(chosen, 0)
    end = tl.cumsum(count, 0)
    place = tl.cumsum(chosen, 0) - 1 + (end - count)[None, :]
    tl.store(offsets, 0)
    tl.store(offsets + 1 + e, end, mask=e < E)
    tl.debug_barrier()
    for j in tl.static_range(TOP):
        expert = tl.load(places + m * TOP + j, mask=m < M, other=0)
        to = tl.sum(tl.where(e[None, :] == expert[:, None], place, 0), 1)
        tl.store(tokens + to, m, mask=m < M)
        tl.store(places + m * TOP + j, to, mask=m < M)
        share = tl.load(shares + m * TOP + j, mask=m < M, other=0.0)
        tl.store(shares + m * TOP + j, share / total, mask=m < M)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `routing.route`; M up to `MAX_TOKENS`."""
    M, E = logits.shape
    made = {"device": logits.device}
    offsets = torch.empty(E + 1, dtype=torch.int32, **made)
    tokens = torch.empty(M * top_k, dtype=torch.int32, **made)
    places = torch.empty(M, top_k, dtype=torch.int32, **made)
    shares = torch.empty(M, top_k, dtype=torch.float32, **made)
    block = max(2, triton.next_power_of_2(M))
    experts = max(2, triton.next_power_of_2(E))
    warps = 4 if block * experts <= 4096 else 16
    _route[(1,)](
        logits,
        offsets,
        tokens,
        places,
        shares,
        M,
        E=E,
        TOP=top_k,
        BE=experts,
        BM=block,
        num_warps=warps,
        **dependent.options(logits.device),
    )
    return offsets, tokens, places, shares


@triton.jit
def _rows(
    x,
    offsets,
    weight,
    out,
    N,
    K,
    E: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    t = tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BE)
    ends = tl.load(offsets + 1 + e, mask=e < E, other=2147483647)
    expert = tl.sum((ends <= t).to(tl.int64))  # the first expert that ends after row t
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    base = weight + (expert * N + n)[:, None] * K + k[None, :]
    acc = tl.zeros([BN, BK], tl.float32)
    for first in range(0, K, BK):
        inside = k + first < K
        w = tl.load(base + first, mask=(n < N)[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")
        v = tl.load(x + t * K + first + k, mask=inside, other=0.0)
        acc += w.to(tl.float32) * v.to(tl.float32)[None, :]
    tl.store(out + t * N + n, tl.sum(acc, 1).to(out.dtype.element_ty), mask=n < N)


def rows(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] sorted by expert -> [T, N], the 16-bit weight [E, N, K] read once per row: for a handful of rows.

    The strongest plain baseline while T is small: it reads the chosen experts and no others.
    """
    E, N, K = weight.shape
    out = x.new_empty(x.shape[0], N)
    bn = 8
    _rows[(triton.cdiv(N, bn), x.shape[0])](
        x,
        offsets,
        weight,
        out,
        N,
        K,
        E=E,
        BN=bn,
        BK=512,
        BE=max(2, triton.next_power_of_2(E)),
        num_warps=4,
        **dependent.options(x.device),
    )
    return out
