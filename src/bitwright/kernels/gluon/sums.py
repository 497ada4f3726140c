"""Adding up what several warpgroups or several programs computed of one tile, always in the same order.

Sums travel in the order in which threads hold them, 16 bytes of every thread side by side, so that every access is
wide and nothing is reordered on the way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def _by_thread(acc):
    """[rows, tokens] of wgmma -> [tokens / 8 ..., 512], the same registers: a row of it is 16 bytes of every thread."""
    REST: gl.constexpr = acc.shape[0] // 64
    PARTS: gl.constexpr = acc.shape[1] // 8
    parts = acc.reshape([REST, 4, 2, 8, PARTS, 4, 2]).permute((0, 4, 1, 3, 5, 2, 6))
    return parts.reshape([REST * PARTS, 512])


@gluon.jit
def _by_tile(parts, REST: gl.constexpr, like):
    """Undo `_by_thread`."""
    PARTS: gl.constexpr = parts.shape[0] // REST
    acc = parts.reshape([REST, PARTS, 4, 8, 4, 2, 2]).permute((0, 2, 5, 3, 1, 4, 6))
    return gl.convert_layout(acc.reshape(like.shape), like.type.layout, True)


@gluon.jit
def _places(parts):
    """Offsets of `_by_thread`'s values in a slot."""
    row = gl.arange(0, parts.shape[0], gl.SliceLayout(1, parts.type.layout))
    column = gl.arange(0, 512, gl.SliceLayout(0, parts.type.layout))
    return row[:, None] * 512 + column[None, :]


@gluon.jit
def contribute(acc, partial, counters, slot, C: gl.constexpr):
    """Leave a piece of a tile for the program that finishes the tile."""
    parts = _by_thread(acc)
    at = slot * (64 * C.REST * C.BM) + _places(parts)
    if C.FLAGGED:
        # Value and flag in one 8-byte word: no fence, no second trip.
        word = parts.to(gl.uint32, bitcast=True).to(gl.int64) | (1 << 32)
        gl.store(partial + at, word)
    else:
        gl.store(partial + at, parts)
        gl.thread_barrier()
        gl.atomic_xchg(counters + slot, 1, sem="release")


@gluon.jit
def collect(acc, partial, counters, begin, PART: gl.constexpr, C: gl.constexpr):
    """Add the pieces of programs begin ... before this one, in this order, and clear their slots for the next launch.

    It waits for them. That ends: programs start in the order of their numbers, a piece is only ever awaited from a
    lower one, and no later launch takes a processor before this one has ended (`Config.OVERLAP` is off).
    """
    PARTS: gl.constexpr = C.NWG // C.KWG
    PEERS: gl.constexpr = C.PEERS
    parts = _by_thread(acc)
    size: gl.constexpr = 64 * C.REST * C.BM
    end = gl.program_id(0)
    if C.FLAGGED:
        # As many slots at a time as fit into registers: what takes long is the way to them, not their size.
        ROWS: gl.constexpr = parts.shape[0]
        many = parts.reshape([1, ROWS, 512]).broadcast_to([PEERS, ROWS, 512])
        L: gl.constexpr = many.type.layout
        peer = gl.arange(0, PEERS, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
        row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
        column = gl.arange(0, 512, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
        at = partial + PART * size + row * 512 + column
        for p in range(begin, end, PEERS):
            there = p + peer < end
            slots = at + (p + peer) * (PARTS * size)
            word = gl.load(slots, mask=there, other=1 << 32, volatile=True)
            while gl.min((word >> 32).to(gl.int32).reshape([parts.numel * PEERS]), 0) == 0:
                word = gl.load(slots, mask=there, other=1 << 32, volatile=True)
            gl.store(slots, gl.zeros_like(word), mask=there)
            values = gl.sum(word.to(gl.uint32).to(gl.float32, bitcast=True), 0)
            parts += gl.convert_layout(values, parts.type.layout, True)
    else:
        places = _places(parts)
        for p in range(begin, end):
            flag = counters + p * PARTS + PART
            while gl.atomic_add(flag, 0, sem="acquire") == 0:
                pass
            gl.store(flag, 0)
            parts += gl.load(partial + (p * PARTS + PART) * size + places, cache_modifier=".cg")
    return _by_tile(parts, C.REST, acc)


@gluon.jit
def gather(acc, gathered, given, taken, i, STEP: gl.constexpr, PART: gl.constexpr, C: gl.constexpr):
    """Sum over the warpgroups that shared the steps of piece i, in their order, for the first of them."""
    parts = _by_thread(acc)
    KWG: gl.constexpr = C.KWG
    if STEP == 0:
        for other in gl.static_range(1, KWG):
            slot = PART * (KWG - 1) + other - 1
            mbarrier.wait(given.index(slot), i & 1)
            parts += gathered.index(slot).load(parts.type.layout)
            mbarrier.arrive(taken.index(slot), count=1)
    else:
        slot: gl.constexpr = PART * (KWG - 1) + STEP - 1
        mbarrier.wait(taken.index(slot), (i & 1) ^ 1)
        gathered.index(slot).store(parts)
        mbarrier.arrive(given.index(slot), count=1)
    return _by_tile(parts, C.REST, acc)
