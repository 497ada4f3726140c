"""Tiles of the Hopper kernel and the division of work among its programs: no GPU and no Triton is needed for them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.kernels.fragments import Kind
from bitwright.kernels.gluon.config import choose, divide

PROCESSORS = 132
BOX = 256  # the most that TMA takes along one side


def pieces(tiles: int, nk: int, programs: int, whole: int, per: int) -> list[list[tuple[int, int, int]]]:
    """`tiles.plan` and `tiles.segment` again, in Python: (tile, first step, end step) of each program in its order."""
    result = []
    for c in range(programs):
        mine = [(tile, 0, nk) for tile in range(c, whole, programs)]
        units = (tiles - whole) * nk
        first, last = min(c * per, units), min(c * per + per, units)
        for tile in range((last - 1) // nk, first // nk - 1, -1) if last > first else ():
            mine.append((tile + whole, max(first - tile * nk, 0), min(last - tile * nk, nk)))
        result.append(mine)
    return result


@settings(max_examples=150, deadline=None)
@given(
    M=st.integers(1, 9000),
    N=st.integers(1, 60000),
    K=st.integers(64, 30000),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([32, 64, 128, 192, 256, 320, None]),
    asymmetric=st.booleans(),
)
def test_every_step_is_done_once(M: int, N: int, K: int, bits: int, group: int | None, asymmetric: bool) -> None:
    group_size = K if group is None or group > K else group
    c = choose(M, Kind(N, K, bits, group_size, torch.bfloat16, asymmetric), PROCESSORS)
    d = divide(M, N, K, c, PROCESSORS)
    tiles, nk = -(-M // c.BM) * -(-N // c.BN), -(-K // c.BK)
    assert 1 <= d.programs <= PROCESSORS * c.PER
    done: dict[int, list[tuple[int, int, int]]] = {}
    for program, mine in enumerate(pieces(tiles, nk, d.programs, d.whole, d.per)):
        for tile, k0, k1 in mine:
            assert k0 < k1
            done.setdefault(tile, []).append((k0, k1, program))
        # The piece of a tile that a later program ends comes first.
        streamed = [(tile, k0, k1) for tile, k0, k1 in mine if tile >= d.whole]
        assert all(k1 == nk for _, _, k1 in streamed[1:]) and all(k0 == 0 for _, k0, _ in streamed[:-1])
    assert sorted(done) == list(range(tiles))
    for tile, found in done.items():
        found.sort()
        assert found[0][0] == 0 and found[-1][1] == nk
        assert all(a[1] == b[0] and a[2] + 1 == b[2] for a, b in pairwise(found))
        if len(found) > 1:
            assert d.partial_size
            assert found[0][2] == (tile - d.whole) * nk // d.per  # where `settle` begins, and where it ends
            assert found[-1][2] == ((tile - d.whole) * nk + nk - 1) // d.per


@pytest.mark.parametrize("N, K", [(4096, 4096), (12288, 4096), (22016, 4096), (8192, 8192), (57344, 8192)])
@pytest.mark.parametrize("M", [129, 256, 300, 512, 1024, 2048])
def test_many_tokens_leave_few_programs_idle(M: int, N: int, K: int) -> None:
    c = choose(M, Kind(N, K, 4, 128, torch.bfloat16), PROCESSORS)
    d = divide(M, N, K, c, PROCESSORS)
    tiles, nk = -(-M // c.BM) * -(-N // c.BN), -(-K // c.BK)
    longest = max(sum(k1 - k0 for _, k0, k1 in mine) for mine in pieces(tiles, nk, d.programs, d.whole, d.per))
    # Equal shares of the steps, or up to the half of a round more where cutting costs more than it gains.
    assert longest <= tiles * nk / PROCESSORS + nk / 2
    last = [k1 - k0 for mine in pieces(tiles, nk, d.programs, d.whole, d.per) for t, k0, k1 in mine if t >= d.whole]
    assert not last or (max(last) == d.per < nk and len(last) <= PROCESSORS)


def test_whole_rounds_need_no_memory_for_pieces() -> None:
    c = choose(2816, Kind(1536, 4096, 4, 128, torch.bfloat16), PROCESSORS)
    d = divide(2816, 1536, 4096, c, PROCESSORS)
    assert d.whole == -(-2816 // c.BM) * -(-1536 // c.BN) and d.partial_size == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 192, 320, 4096])
def test_configurations_fit_the_hardware(bits: int, group_size: int) -> None:
    for M in (1, 8, 9, 16, 31, 33, 64, 65, 128, 129, 200, 256, 300, 2048):
        for N in (16, 4096, 22016, 57344):
            c = choose(M, Kind(N, 4096, bits, group_size, torch.float16, True, True), PROCESSORS)
            assert c.NS >= 3 and c.stages_that_fit >= c.NS and c.NS % c.KWG == 0
            assert max(c.BM, c.BN, c.GROUPS) <= BOX
            assert group_size % c.BK == 0 or c.BK % group_size == 0 or group_size == 4096
            assert (1 if group_size == 4096 else max(1, c.BK // group_size)) == c.GROUPS
            threads = (4 * c.NWG + 4) * 32
            assert c.PER * threads * c.MAXNREG <= 65536
    small = choose(1, Kind(16, 40, bits, 40, torch.float16), PROCESSORS)
    assert small.GROUPS == 1  # one group, narrower than a step
