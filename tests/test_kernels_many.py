"""The kernel for many tokens without a GPU: division of work, choice of tiles, and what it compiles to for Hopper."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.kernels import hopper
from bitwright.kernels.fragments import Kind
from bitwright.kernels.nvrtc import compile as nvrtc
from bitwright.kernels.nvrtc import many_config
from bitwright.kernels.nvrtc.many_config import Config, Division, best, choose, divide, estimate, tile, tiles

BF16, FP16 = torch.bfloat16, torch.float16
BASE = Config(BITS=4, FLOAT16=0, ASYM=0, GROUP=128, BIAS=0, TMA_OUT=1, ROWS=128, TOKENS=256)
SHAPES = [(4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (8192, 8192), (57344, 8192), (8192, 28672)]


def chosen(M: int, N: int, K: int, processors: int = 132, **changes: Any) -> Config:
    asked: dict[str, Any] = {"bits": 4, "group_size": 128, "dtype": BF16, "asymmetric": False, "bias": False} | changes
    return choose(M, Kind(N, K, **asked), processors)


# --- division


def pieces(d: Division, steps: int, item: int) -> tuple[int, range]:
    """(tile, its steps) of an item: `item_of` of many_tile.cuh."""
    if item < d.whole:
        return item, range(steps)
    left, part = divmod(item - d.whole, d.cuts)
    return d.whole + left, range(steps * part // d.cuts, steps * (part + 1) // d.cuts)


problems = {
    "M": st.integers(1, 5000),
    "N": st.integers(1, 20000),
    "K": st.integers(1, 9000),
    "rows": st.sampled_from([128, 256]),
    "tokens": st.sampled_from([64, 80, 128, 144, 160]),
    "cluster": st.sampled_from([1, 2, 4]),
    "processors": st.sampled_from([4, 7, 78, 114, 132]),
}


@settings(max_examples=150, deadline=None)
@given(**problems, cuts=st.sampled_from([None, 1, 2, 3, 16, 200]))
def test_every_step_of_every_tile_is_taken_once(
    M: int, N: int, K: int, rows: int, tokens: int, cluster: int, processors: int, cuts: int | None
) -> None:
    c = tile(BASE, rows, tokens, cluster)
    d, steps = divide(M, N, K, c, processors, cuts), -(-K // 64)
    tiles = -(-M // tokens) * -(-N // (rows * cluster))
    taken: Counter[int] = Counter()
    for item in range(d.items):
        at, part = pieces(d, steps, item)
        assert at < tiles and len(part) > 0, "a piece with nothing to add would have to wait for nobody"
        assert (len(part) < steps) == (item >= d.whole), "a whole tile is settled with nobody, a piece always"
        taken[at] += len(part)
    assert len(taken) == tiles and set(taken.values()) == {steps}
    assert d.blocks % cluster == 0 and 0 < d.blocks <= processors
    assert d.blocks // cluster <= d.items, "a block without work"
    left = tiles - d.whole
    assert left < processors // cluster, "whole rounds are never cut"
    assert d.counters == left * cluster * 2 and d.numbers == left * d.cuts * cluster * rows * tokens


def test_cuts_are_those_of_the_least_estimate() -> None:
    for M, N, K in ((128, 4096, 4096), (512, 4096, 11008), (300, 12288, 4096), (2048, 10240, 8192)):
        for c in tiles(BASE, N, 132):
            d = divide(M, N, K, c, 132)
            times = {cuts: estimate(M, N, K, c, 132, cuts) for cuts in range(1, 17)}
            assert times[d.cuts] == min(times.values())
    few = tile(BASE, 128, 256, 2)
    assert divide(256, 4096, 11008, few, 132).cuts > 1, "16 tiles in one round would leave 100 processors idle"
    assert divide(256, 4096, 64, few, 132).cuts == 1, "a step is not worth its sums"
    assert divide(512, 8448, 4096, few, 132, cuts=4) == Division(132, 66, 1, 66, 0, 0), "nothing is left after a round"


# --- choice


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 9000), N=st.integers(1, 30000), K=st.integers(1, 9000), bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64, 128, 192, 256, None]), dtype=st.sampled_from([BF16, FP16]),
    asymmetric=st.booleans(),
)  # fmt: skip
def test_tiles_fit(
    M: int, N: int, K: int, bits: int, group_size: int | None, dtype: torch.dtype, asymmetric: bool
) -> None:
    group = K if group_size is None else group_size
    c = chosen(M, N, K, bits=bits, group_size=group, dtype=dtype, asymmetric=asymmetric)
    assert c.stages >= 3 and c.shared <= many_config.SHARED_MEMORY
    assert c.TOKENS % 16 == 0 and c.TOKENS // c.CLUSTER % 8 == 0, "shares begin where the swizzle does"
    assert c.TOKENS % c.piece == 0
    assert (bits, dtype == FP16, asymmetric) == (c.BITS, c.FLOAT16, c.ASYM)
    assert (N % 8 == 0) == c.TMA_OUT, "rows of results at multiples of 16 bytes"
    assert max(1, min(c.SPAN * 64 // group if group < K else 1, 4)) == c.groups, "scales of a step"
    assert group >= K or group % (64 * c.SPAN) == 0 or 64 * c.SPAN % group == 0, "a step cuts no group"
    assert c.CLUSTER == 1 or c.ROWS < N, "the second block would have no rows"


def test_one_processor_has_no_clusters() -> None:
    assert all(c.CLUSTER == 1 for c in tiles(BASE, 8192, 1))
    assert chosen(512, 4096, 4096, processors=1).CLUSTER == 1


def test_the_choice_has_the_least_estimate() -> None:
    for M in (128, 300, 1024):
        for N, K in SHAPES:
            c = chosen(M, N, K)

            def time(c: Config, M: int = M, N: int = N, K: int = K) -> float:
                return min(estimate(M, N, K, c, 132, cuts) for cuts in range(1, 17))

            assert time(c) == min(time(other) for other in tiles(BASE, N, 132))


def test_tiles_follow_the_tokens() -> None:
    assert chosen(300, 8192, 8192).TOKENS == 160, "300 tokens are not 384"
    square = chosen(1024, 8192, 8192)
    assert square.ROWS * square.TOKENS == 128 * 256 and square.CLUSTER == 2
    assert chosen(200, 100, 4096).CLUSTER == 1


@settings(max_examples=60, deadline=None)
@given(**problems, cuts=st.integers(1, 16))
def test_more_work_takes_longer(
    M: int, N: int, K: int, rows: int, tokens: int, cluster: int, processors: int, cuts: int
) -> None:
    c = tile(BASE, rows, tokens, cluster)
    time = estimate(M, N, K, c, processors, cuts)
    assert 0 < time <= estimate(M, N, K + 64 * 16, c, processors, cuts)
    # With the best cuts only: pieces that pay for nothing may cost more than another round of whole tiles.
    assert best(M, N, K, c, processors) < best(M + tokens * processors, N, K, c, processors)
    assert 2 * M * N * K / (time * 1e-6) < processors * 7.5e12, (
        "faster than the hardware: 990 TFLOP/s of 132 processors"
    )


def test_hopper_takes_it_unless_powers_of_two_suit_better() -> None:
    def suits(M: int, N: int, K: int) -> bool:
        return hopper._suits(M, Kind(N, K, 4, 128, BF16), 132)

    # Timings behind this are in dev/LOG.md: 300 tokens of 8192² 58 against 83 us, 256 of 4096² 20.5 against 19.5.
    assert all(suits(M, N, K) for M in (300, 512, 1024, 2048, 8192) for N, K in SHAPES)
    assert not suits(256, 4096, 4096)
    for bits, group_size in ((3, 128), (8, 128), (4, 32)):
        assert hopper._suits(300, Kind(8192, 8192, bits, group_size, BF16), 132)


# --- the kernel


def compiled() -> list[Config]:
    """Hot ones, and what stretches registers: every width of codes, both grids, both ways to results."""
    wide, tall, crowded = tile(BASE, 128, 256, 2), tile(BASE, 256, 144, 2), tile(BASE, 256, 160, 2)
    square, high = tile(BASE, 128, 128, 2), tile(BASE, 256, 128, 2)
    plain = [tile(BASE, 128, tokens, 2) for tokens in (64, 80, 128, 208)] + [tile(BASE, 128, 128, 1), wide, tall]
    asked = [
        tile(replace(BASE, BITS=bits, ASYM=asym, GROUP=group, BIAS=1, FLOAT16=float16), c.ROWS, c.TOKENS, 2)
        for c, bits, asym, group, float16 in (
            (wide, 4, 1, 32, 1), (wide, 2, 1, 128, 0), (wide, 3, 1, 32, 0), (wide, 8, 1, 32, 0), (wide, 8, 0, 128, 1),
            (tall, 2, 0, 32, 1), (tall, 3, 1, 32, 0), (tall, 8, 1, 32, 0), (crowded, 4, 1, 32, 0),
            (crowded, 8, 1, 32, 0), (square, 3, 1, 32, 0), (square, 8, 1, 64, 0), (square, 2, 0, 64, 1),
            (high, 4, 1, 32, 0), (high, 8, 0, 128, 0),
        )
    ]  # fmt: skip
    return [*plain, crowded, *asked, replace(tall, TMA_OUT=0, BIAS=1), replace(wide, TMA_OUT=0)]


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize("c", compiled(), ids=str)
def test_compiles_for_hopper(c: Config, tmp_path: Path) -> None:
    sass = pytest.importorskip("sass")
    cubin, said = c.cubin("--ptxas-options=-v")
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None
    # A few numbers may be kept aside over the steps, addresses of results for instance, but not in them.
    assert int(spilled[1]) <= 32, said
    assert "Loss" not in said and "serialized" not in said, said
    code = sass.disassembled(cubin, tmp_path)
    kind = "" if c.FLOAT16 else r"\.BF16"
    products = re.findall(rf"HGMMA\.64x{c.TOKENS}x16\.F32{kind} R\d+, R\d+, gdesc", code)
    assert len(products) == code.count("HGMMA") == c.SPAN * 4 * c.ROWS // 128, "four of 64 rows x 64 columns"
    assert ("UTMASTG" in code) == bool(c.TMA_OUT) and ("MULTICAST" in code) == (c.CLUSTER > 1)
    (body,) = sass.loops(code)
    assert not sass.overwritten(code), "a register changes that a product may be reading"
    operations = [operation for operation, _ in body]
    assert not [x for x in operations if x.startswith(("STL", "LDL", "MEMBAR"))]
    # While a warpgroup makes what the next product needs the one before runs: no wait in the loop is for the last one.
    waits = [operands for operation, operands in body if operation.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == c.SPAN * 4 // c.CHUNKS and all(x.endswith("0x1") for x in waits), waits
    made = sum(operation.startswith("HMUL2") for operation in operations)
    assert made == 4 * len(waits) * c.CHUNKS * c.ROWS // 128, "every pair of weights once"
