"""The Triton kernel of `attention.decode`: one new token per sequence against its cache, split over the sequence.

One program reads a stretch of the keys and values of one (sequence, kv head) and answers all query heads that share
it, so that the cache is read once. Stretches are merged by whichever program of the pair arrives last, in the order of
the stretches: one launch, and the same bits every time. Every program turns its own queries; the one with the first
stretch also turns the new key, counts it from registers and writes it into the cache, where no other program reads it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels import dependent
from bitwright.kernels.dependent import release, wait


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
        # The first stretch always has a key, the new one or old ones: `higher` is finite in every row that is kept.
        higher = tl.maximum(top, tl.max(tops, 0))
        share = tl.exp2(tops - higher[None, :])
        fade = tl.exp2(top - higher)
        weight = weight * fade + tl.sum(weights * share, 0)
        acc = acc * fade[:, None] + tl.sum(parts * share[:, :, None], 0)
        top = higher
    rows = (pair * R + m)[:, None] * D + d[None, :]
    tl.store(out + rows, (acc / weight[:, None]).to(out.dtype.element_ty), mask=(m < R)[:, None])


@triton.jit
def _old(keys, values, pair, first, end, d, S, KEYS: tl.constexpr):
    """Keys and values [KEYS, D] at positions `first` on, 0 from `end` on."""
    n = first + tl.arange(0, KEYS)
    at = (pair * S + n)[:, None] * d.shape[0] + d[None, :]
    k = tl.load(keys + at, mask=(n < end)[:, None], other=0.0)
    v = tl.load(values + at, mask=(n < end)[:, None], other=0.0)
    return k, v


@triton.jit
def _count(query, k, v, first, end, top, weight, acc, scale_log2, KEYS: tl.constexpr):
    """Running maximum, weight and sum of values after the keys at `first` to `end`, of which there may be none."""
    n = first + tl.arange(0, KEYS)
    s = tl.where((n < end)[None, :], tl.dot(query, tl.trans(k)) * scale_log2, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    level = tl.where(higher == float("-inf"), 0.0, higher)  # of no key at all, so that nothing is subtracted from -inf
    p = tl.exp2(s - level[:, None])
    fade = tl.exp2(top - level)
    weight = weight * fade + tl.sum(p, 1)
    acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v)
    return higher, weight, acc


@triton.jit
def _decode(
    qkv,
    cos,
    sin,
    positions,
    keys,
    values,
    out,
    partial,
    stats,
    counters,
    scale_log2,
    S,
    KV: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,  # R padded to what tl.dot takes
    KEYS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,  # R padded to a power of two
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    sequence = pair // KV
    position = tl.load(positions + sequence).to(tl.int32)
    old = tl.minimum(position, S)
    stretch = tl.cdiv(tl.cdiv(old, KEYS), SPLITS) * KEYS
    begin = split * stretch
    end = tl.minimum(begin + stretch, old)
    fresh = (split == 0) & (position < S)  # where the cache is full, the new key has no place and does not count
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    # Positions, tables and the keys of earlier tokens were there before this step began; the queries were not.
    k, v = _old(keys, values, pair, begin, end, d, S, KEYS)
    if ROPE:
        angle = tl.minimum(position, S - 1).to(tl.int64) * (D // 2) + d % (D // 2)
        cosine = tl.load(cos + angle)
        sine = tl.load(sin + angle)
    wait(PDL)
    head = sequence * (R + 2) * KV + pair % KV * R  # the first query head of this pair in qkv
    query_at = (head + r)[:, None] * D + d[None, :]
    key_at = (sequence * (R + 2) * KV + R * KV + pair % KV) * D + d
    query = tl.load(qkv + query_at, mask=(r < R)[:, None], other=0.0)
    key = tl.load(qkv + key_at, mask=fresh, other=0.0)
    value = tl.load(qkv + key_at + KV * D, mask=fresh, other=0.0)
    if ROPE:
        # Pairs (i, i + D / 2), both from the side of each of the two.
        across = tl.where(d < D // 2, D // 2, -(D // 2))
        sine = tl.where(d < D // 2, -sine, sine)
        other = tl.load(qkv + query_at + across[None, :], mask=(r < R)[:, None], other=0.0)
        query = (query.to(tl.float32) * cosine[None, :] + other.to(tl.float32) * sine[None, :]).to(query.dtype)
        other_key = tl.load(qkv + key_at + across, mask=fresh, other=0.0)
        key = (key.to(tl.float32) * cosine + other_key.to(tl.float32) * sine).to(key.dtype)
    new_at = (pair * S + position) * D + d
    tl.store(keys + new_at, key, mask=fresh)
    tl.store(values + new_at, value, mask=fresh)
    score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale_log2
    top = tl.where(fresh, score, float("-inf"))
    weight = tl.zeros([ROWS], tl.float32) + tl.where(fresh, 1.0, 0.0)
    acc = tl.zeros([ROWS, D], tl.float32) + value.to(tl.float32)[None, :]  # zero where it does not count
    top, weight, acc = _count(query, k, v, begin, end, top, weight, acc, scale_log2, KEYS)
    for first in range(begin + KEYS, end, KEYS):
        k, v = _old(keys, values, pair, first, end, d, S, KEYS)
        top, weight, acc = _count(query, k, v, first, end, top, weight, acc, scale_log2, KEYS)
    if SPLITS == 1:
        rows = (pair * R + r)[:, None] * D + d[None, :]
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
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    splits: int,
    block: int,
    scratch: tuple[Tensor, ...],
) -> Tensor:
    """See `attention.decode`. block: keys per step (a power of two, at least 16). scratch: of `attention.workspace`."""
    B, KV, S, D = keys.shape
    heads = qkv.shape[1] // D - 2 * KV
    R = heads // KV
    out = qkv.new_empty(B, heads, D)
    merge_rows = triton.next_power_of_2(R)
    partial, stats, counters = scratch
    _decode[(B * KV, splits)](
        qkv,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        positions,
        keys,
        values,
        out,
        partial,
        stats,
        counters,
        D**-0.5 * 1.4426950408889634,  # softmax in powers of two
        S,
        KV=KV,
        R=R,
        D=D,
        ROPE=cos is not None,
        SPLITS=splits,
        ROWS=max(16, merge_rows),
        KEYS=block,
        MERGE_ROWS=merge_rows,
        CHUNK=min(triton.next_power_of_2(splits), max(1, 8192 // (merge_rows * D))),  # 64 registers a thread
        num_warps=4,
        num_stages=3,
        **dependent.options(qkv.device),
    )
    return out
