"""Which tiles, and which part of their steps along K, a program of the Gluon kernel computes.

Tiles times steps are cut into equal runs: whole tiles first, one after the other on each program, then what is left in
runs that may begin and end inside a tile ("stream-K", Osama et al., 2023). A run is taken from its end: the tile that
the next program finishes comes first, so that its piece is there long before it is asked for.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def segment(i, whole, tiles_whole, first_unit, last_unit, nk):
    """The i-th piece of work of this program: (tile, first step, end step)."""
    tile = gl.program_id(0) + i * gl.num_programs(0)
    k0 = 0
    k1 = nk
    if i >= whole:
        tile = (last_unit - 1) // nk - (i - whole)
        k0 = max(first_unit - tile * nk, 0)
        k1 = min(last_unit - tile * nk, nk)
        tile += tiles_whole
    return tile, k0, k1


@gluon.jit
def plan(tiles, tiles_whole, per, nk):
    """(whole tiles, pieces, first unit, end unit) of this program."""
    c = gl.program_id(0)
    C = gl.num_programs(0)
    whole = max(gl.cdiv(tiles_whole - c, C), 0)
    units = (tiles - tiles_whole) * nk
    first = min(c * per, units)
    last = min(first + per, units)
    pieces = 0
    if last > first:
        pieces = (last - 1) // nk - first // nk + 1
    return whole, pieces, first, last


@gluon.jit
def place(tile, problem, C: gl.constexpr):
    """Where a tile lies: (first token, end of its tokens, tile along N, expert)."""
    M, _N, nm, nn, _nk, offsets = problem
    if C.EXPERTS:
        # Token tiles are numbered through all experts; the expert is the number of those that end at or before it.
        slot = tile % nm
        first, end, before = expert_table(offsets, C)
        e = gl.sum((before + gl.cdiv(end - first, C.BM) <= slot).to(gl.int32), 0)
        start = gl.load(offsets + e)
        here = gl.sum(gl.where(gl.arange(0, C.EXPERTS, first.type.layout) == e, before, 0), 0)
        return start + (slot - here) * C.BM, gl.load(offsets + e + 1), tile // nm, e
    m, n = in_bands(tile, nm, nn, C.GM)
    return m * C.BM, M, n, 0


@gluon.jit
def in_bands(tile, nm, nn, GM: gl.constexpr):
    """(token tile, tile along N): bands of GM token tiles, so that what is read twice is still in L2."""
    band = tile // (GM * nn)
    rows = min(nm - band * GM, GM)
    inside = tile - band * GM * nn
    return band * GM + inside % rows, inside // rows


@gluon.jit
def expert_table(offsets, C: gl.constexpr):
    """(first token, end, token tiles of earlier experts) of every expert; EXPERTS is padded, the rest are empty."""
    E: gl.constexpr = C.EXPERTS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    e = gl.arange(0, E, LAYOUT)
    there = e < C.STACK
    first = gl.load(offsets + e, mask=there, other=0)
    end = gl.load(offsets + e + 1, mask=there, other=0)
    tiles = gl.cdiv(end - first, C.BM)
    return first, end, gl.associative_scan(tiles, 0, _add) - tiles


@gluon.jit
def _add(a, b):
    return a + b
