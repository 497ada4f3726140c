"""The int8 kernels on a GPU: bit for bit the CPU programs, the same bits again, graphs, streams, odd addresses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bitwright.kernels import int8_fragments
from bitwright.kernels.int8_fragments import MAX_COLUMNS
from bitwright.kernels.int8_ops import int8_finish, int8_linear
from bitwright.kernels.problem import GLUON, HOPPER, cuda_features
from bitwright.kernels.triton import int8
from bitwright.kernels.triton.config import Config
from gpu import cases, int8_cases
from gpu.int8_cases import Case

pytestmark = pytest.mark.gpu

WIDTHS = ((4, 4), (4, 8), (8, 8))
EXACT = int8_cases.matrix() + [
    Case(*width, M=M, N=N, B=B, bias=M % 2 == 0)
    for width in WIDTHS
    for M, N, B in ((1, 4096, 4096), (16, 16, 64), (17, 1, 1), (33, 130, 2000), (64, 264, 700), (65, 4096, 384))
] + [Case(*width, M=M, N=4000, B=700, O=40) for width in WIDTHS for M in (128, 300, 1030)]  # fmt: skip
RANDOM = [
    Case(*width, M=M, N=1000, B=3840, O=256, bias=True, dtype=dtype, exact=False)
    for width in WIDTHS
    for M in (1, 40, 600)
    for dtype in cases.DTYPES
]
TILES = [
    Config(BN, BM, 128, warps, 3, 1 if BM == 128 else 3)
    for BN, warps in ((64, 4), (128, 8), (256, 8))
    for BM in (16, 64, 128)
]
TILES += [
    Config(128, 256, 128, 8, 3),
    Config(128, 256, 64, 8, 4),
    Config(128, 32, 64, 8, 5, 4),
    Config(128, 128, 128, 8, 3, 3),
]
FINISHES = [Case(M=3, N=40), Case(M=300, N=1000, O=40, bias=True), Case(8, 8, M=70, N=70, O=16, dtype=torch.float16)]
HOPPER_TILES = [(128, 2, 3, 16), (128, 2, 6, 2), (256, 1, 3, 16), (64, 2, 4, 1)]  # BM, REST, NS, GM
# What `int8_linear` would choose, and both kernels at any number of tokens.
KERNELS = {"chosen": int8_linear, "triton": int8.linear}
if {HOPPER, GLUON} <= cuda_features():
    hopper = import_module("bitwright.kernels.gluon.int8")
    KERNELS["gluon"] = hopper.linear
FINISHES += [Case(M=M, N=1000, O=256, bias=True) for M in (1, 17, 33, 65, 1000)]
SHARED_K = Case(4, 4, N=512, B=4096, O=32, bias=True, exact=False)  # few tiles: several programs share each


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Every kernel compiled once, in threads; what fails here fails again below."""
    work = [partial(int8_cases.check, kernel, case) for kernel in KERNELS.values() for case in EXACT + RANDOM]
    work += [partial(check_tiles, tiles, bits) for tiles in TILES for bits in (4, 8)]
    if "gluon" in KERNELS:
        work += [partial(check_hopper_tiles, tiles, bits) for tiles in HOPPER_TILES for bits in (4, 8)]

    def attempt(job: partial[None]) -> None:
        with suppress(Exception):
            job()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(attempt, work))
        torch.cuda.synchronize()
    finally:
        torch.set_num_threads(threads)


def check_tiles(tiles: Config, bits: int) -> None:
    int8_cases.check(partial(int8.linear, tiles=tiles), Case(bits, bits, M=150, N=300, B=900, O=40, bias=True))


def check_hopper_tiles(tiles: tuple[int, int, int, int], bits: int) -> None:
    """Over several rounds of tiles: N, M and the last step ragged; results written through TMA and value by value."""
    BM, REST, NS, GM = tiles
    for M, N, O in ((150, 5300, 40), (700, 5304, 0), (1500, 5304, 16)):
        case = Case(bits, bits, M=M, N=N, B=900, O=O, bias=True)
        c = hopper.choose(case.M, case.N, -(-O // 16) * 16, bits, case.bias, 132)
        c = replace(c, BM=BM, REST=REST, GM=GM, NS=2)
        c = replace(c, NS=min(NS, c.stages_that_fit))
        int8_cases.check(partial(hopper.linear, config=c), case)


@pytest.mark.parametrize("case", EXACT + RANDOM, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_against_the_cpu(kernel: str, case: Case, poison: None) -> None:
    int8_cases.check(KERNELS[kernel], case)


@pytest.mark.skipif("gluon" not in KERNELS, reason="the Gluon kernel needs a Hopper GPU and a Triton that it knows")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tiles", HOPPER_TILES, ids=str)
def test_every_hopper_tile(tiles: tuple[int, int, int, int], bits: int, poison: None) -> None:
    check_hopper_tiles(tiles, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_every_tile(tiles: Config, bits: int, poison: None) -> None:
    check_tiles(tiles, bits)


@pytest.mark.parametrize("case", FINISHES, ids=str)
def test_the_end_alone(case: Case, poison: None) -> None:
    int8_cases.check_finish(int8_finish, case)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_longest_sum(bits: int) -> None:
    """Every code the lowest, over the widest input: one more column would pass 2^31."""
    given = list(int8_cases.operands(Case(bits, 8, M=1, N=16, B=MAX_COLUMNS)))
    lowest = -(1 << (bits - 1))
    given[0][:, :MAX_COLUMNS] = -128
    weight = torch.full((16, MAX_COLUMNS), lowest, dtype=torch.int8)
    given[4] = int8_fragments.pack(weight) if bits == 4 else torch.full_like(given[4], -128)
    given[1], given[5] = torch.full((1,), 2.0**-16), torch.ones(16)
    y = int8_linear(*int8_cases.on(tuple(given), "cuda"))
    cases.assert_equal(y, torch.full((1, 16), 128.0 * -lowest * MAX_COLUMNS / 65536).to(torch.bfloat16), "longest")


@pytest.mark.parametrize(
    "case", [Case(4, 8, M=1_100_000, N=2000, B=100), Case(4, 8, M=66_000, N=40, B=33_000)], ids=("outputs", "codes")
)
def test_offsets_beyond_32_bits(case: Case) -> None:
    """More than 2^31 outputs or codes: the last rows are right."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    last = int8_cases.operands(replace(case, M=3))
    given = list(int8_cases.on(last, "cuda"))
    for i in range(4):
        whole = given[i].new_zeros(case.M, *given[i].shape[1:])
        whole[-3:] = given[i]
        given[i] = whole
    y = int8_linear(*given)
    assert max(y.numel(), given[0].numel()) > 1 << 31
    cases.assert_equal(y[-3:], int8_linear(*last), "last rows")
    assert not y[:100].any()


def on_gpu(case: Case, seed: int = 0) -> tuple[Any, ...]:
    return int8_cases.on(int8_cases.operands(case, seed), "cuda")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("M", [1, 17, 64, 100, 1500])
def test_repeats(M: int, bits: int) -> None:
    given = on_gpu(replace(SHARED_K, M=M, bits=bits, activation_bits=bits))
    first = int8_linear(*given)
    for _ in range(20):
        assert torch.equal(int8_linear(*given), first)


@pytest.mark.parametrize("M", [1, 64, 300])
def test_graph(M: int, poison: None) -> None:
    """Captured on some codes and replayed on others."""
    case = replace(SHARED_K, M=M)
    _, *rest = on_gpu(case)
    tokens = [on_gpu(case, seed)[0] for seed in range(4)]

    def run(codes: Tensor) -> Tensor:
        return int8_linear(codes, *rest)

    cases.check_graph(run, tokens[0], tokens[1:])


def test_graphs_and_eager_calls_side_by_side() -> None:
    """Two graphs on streams of their own beside eager calls on a third: no workspace is shared."""
    given = [on_gpu(SHARED_K, seed) for seed in range(3)]
    expected = [int8_linear(*g) for g in given]
    torch.cuda.synchronize()
    graphs, results = [], []
    for one in given[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([int8_linear(*one) for _ in range(20)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(5):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = [int8_linear(*given[2]) for _ in range(20)]
        torch.cuda.synchronize()
        for outputs, right in zip([*results, eager], expected, strict=True):
            assert all(torch.equal(y, right) for y in outputs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("M", [5, 300])
def test_unaligned_operands(M: int, bits: int) -> None:
    """Codes, outliers and weights that start in the middle of a buffer, at addresses that no wide load takes."""
    given = list(on_gpu(replace(SHARED_K, M=M, bits=bits, activation_bits=bits)))
    expected = int8_linear(*given)
    for i in (0, 3, 4, 7):
        whole = torch.cat((given[i].new_zeros(1), given[i].flatten()))
        given[i] = whole[1:].view(given[i].shape)
    assert torch.equal(int8_linear(*given), expected)


@pytest.mark.parametrize("case", [replace(SHARED_K, M=3), Case(8, 8), replace(SHARED_K, M=70)], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(int8_linear, on_gpu(case))
    torch.library.opcheck(int8_finish, int8_cases.on(int8_cases.finish_operands(case), "cuda"))
