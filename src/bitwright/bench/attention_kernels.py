"""The Triton kernel of `attention.decode`: one new token per sequence against its cache, split over the sequence.

One program reads a stretch of the keys and values of one (sequence, kv head) and answers all query heads that share
it, so that the cache is read once. Stretches are merged by whichever program of the pair arrives last, in the order of
the stretches: one launch, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.bench import dependent
from bitwright.bench.dependent import release, wait


@triton.jit
def _merge(
    partial,
    stats,
    out,
    pair,
    R: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The output of one (sequence, kv head) from the partial ones of its stretches, `CHUNK` of them at a time."""
    m = tl.arange(0, MERGE_ROWS)
    d = tl.arange(0, D)
    top = tl.full([MERGE_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([MERGE_ROWS], tl.float32)
    acc = tl.zeros([MERGE_ROWS, D], tl.float32)
    for first in range(0, SPLITS, CHUNK):
        c = first + tl.arange(0, CHUNK)
        slot = (pair * SPLITS + c)[:, None] * R + m[None, :]
        inside = (c < SPLITS)[:, None] & (m < R)[None, :]
        # .cg: written by other SMs, so not from this one's L1
        tops = tl.load(stats + 2 * slot, mask=inside, other=float("-inf"), cache_modifier=".cg")
        weights = tl.load(stats + 2 * slot + 1, mask=inside, other=0.0, cache_modifier=".cg")
        at = slot[:, :, None] * D + d[None, None, :]
        parts = tl.load(partial + at, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        # The first stretch always has a key, so `higher` is finite in every row that is kept.
        higher = tl.maximum(top, tl.max(tops, 0))
        share = tl.exp2(tops - higher[None, :])
        fade = tl.exp2(top - higher)
        weight = weight * fade + tl.sum(weights * share, 0)
        acc = acc * fade[:, None] + tl.sum(parts * share[:, :, None], 0)
        top = higher
    rows = (pair * R + m)[:, None] * D + d[None, :]
    tl.store(out + rows, (acc / weight[:, None]).to(out.dtype.element_ty), mask=(m < R)[:, None])


@triton.jit
def _decode(
    q,
    keys,
    values,
    positions,
    out,
    partial,
    stats,
    counters,
    scale_log2,
    S,
    KV: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,  # R padded to what tl.dot takes
    KEYS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,  # R padded to a power of two
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)  # caches, partial results and counters are all of kernels before this one
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    length = tl.minimum(tl.load(positions + pair // KV).to(tl.int32) + 1, S)
    stretch = tl.cdiv(tl.cdiv(length, KEYS), SPLITS) * KEYS
    begin = split * stretch
    end = tl.minimum(begin + stretch, length)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    rows = (pair * R + r)[:, None] * D + d[None, :]
    query = tl.load(q + rows, mask=(r < R)[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for first in range(begin, end, KEYS):
        n = first + tl.arange(0, KEYS)
        at = (pair * S + n)[:, None] * D + d[None, :]
        k = tl.load(keys + at, mask=(n < end)[:, None], other=0.0)
        v = tl.load(values + at, mask=(n < end)[:, None], other=0.0)
        s = tl.where((n < end)[None, :], tl.dot(query, tl.trans(k)) * scale_log2, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(top - higher)
        weight = weight * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v)
        top = higher
    if SPLITS == 1:
        tl.store(out + rows, (acc / weight[:, None]).to(out.dtype.element_ty), mask=(r < R)[:, None])
    else:
        slot = (pair * SPLITS + split) * R + r
        tl.store(partial + slot[:, None] * D + d[None, :], acc, mask=(r < R)[:, None])
        tl.store(stats + 2 * slot, top, mask=r < R)
        tl.store(stats + 2 * slot + 1, weight, mask=r < R)
        tl.debug_barrier()  # every thread's partials before this program counts as arrived
        if tl.atomic_add(counters + pair, 1, sem="acq_rel") == SPLITS - 1:
            _merge(partial, stats, out, pair, R, D, SPLITS, MERGE_ROWS, CHUNK)
            tl.store(counters + pair, 0)


def decode(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, splits: int, block: int, scratch: tuple[Tensor, ...]
) -> Tensor:
    """See `attention.decode`. block: keys per step (a power of two, at least 16). scratch: of `attention.workspace`."""
    B, heads, D = q.shape
    KV, S = keys.shape[1], keys.shape[2]
    R = heads // KV
    out = torch.empty_like(q)
    merge_rows = triton.next_power_of_2(R)
    partial, stats, counters = scratch
    _decode[(B * KV, splits)](
        q,
        keys,
        values,
        positions,
        out,
        partial,
        stats,
        counters,
        D**-0.5 * 1.4426950408889634,  # softmax in powers of two
        S,
        KV=KV,
        R=R,
        D=D,
        SPLITS=splits,
        ROWS=max(16, merge_rows),
        KEYS=block,
        MERGE_ROWS=merge_rows,
        CHUNK=min(triton.next_power_of_2(splits), max(1, 8192 // (merge_rows * D))),  # 64 registers a thread
        num_warps=4,
        num_stages=3,
        **dependent.options(q.device),
    )
    return out
