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
def settle(acc, partial, counters, stream_tile, ends, nk, per, PART: gl.constexpr, C: gl.constexpr):
    """Leave this program's piece of a tile; whoever comes last adds all of them up, in the order of the programs.

    ends: whether the piece ends with the tile. Gives (whether this program came last, the sums if so). Nobody waits
    for anybody, so that programs may run in any order and beside other launches.
    """
    PARTS: gl.constexpr = C.NWG // C.KWG
    PEERS: gl.constexpr = C.PEERS
    SIZE: gl.constexpr = 64 * C.REST * C.BM
    parts = _by_thread(acc)
    # A program leaves at most two pieces: one that ends with its tile, and one that does not.
    slot = (2 * gl.program_id(0) + gl.where(ends, 0, 1)) * PARTS + PART
    gl.store(partial + slot * SIZE + _places(parts), parts)
    gl.thread_barrier()
    begin = stream_tile * nk // per
    end = (stream_tile * nk + nk - 1) // per
    counter = counters + stream_tile * PARTS + PART
    last = gl.atomic_add(counter, 1, sem="acq_rel") == end - begin
    if last:
        gl.store(counter, 0)
        parts = gl.zeros_like(parts)
        if PEERS == 1:
            for p in range(begin, end + 1):
                at = (2 * p + gl.where(p == end, 0, 1)) * PARTS + PART
                parts += gl.load(partial + at * SIZE + _places(parts), cache_modifier=".cg")
        else:
            # As many slots at a time as fit into registers: what takes long is the way to them, not their size.
            ROWS: gl.constexpr = parts.shape[0]
            many = parts.reshape([1, ROWS, 512]).broadcast_to([PEERS, ROWS, 512])
            L: gl.constexpr = many.type.layout
            peer = gl.arange(0, PEERS, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
            row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
            column = gl.arange(0, 512, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
            for first in range(begin, end + 1, PEERS):
                p = first + peer
                at = (2 * p + gl.where(p == end, 0, 1)) * PARTS + PART
                slots = partial + at * SIZE + row * 512 + column
                values = gl.load(slots, mask=p <= end, other=0.0, cache_modifier=".cg")
                parts += gl.convert_layout(gl.sum(values, 0), parts.type.layout, True)
    return last, _by_tile(parts, C.REST, acc)


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
