"""The kernel for many tokens on a Hopper GPU: tiles to the last bit, pieces, repeats, graphs, chains, odd sizes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bitwright.kernels.fragments import Fragments, dequantize, pack, random
from bitwright.kernels.nvrtc import many_tokens
from bitwright.kernels.nvrtc.many_config import Config, choose, divide, tile
from bitwright.kernels.problem import HOPPER, NVRTC, cuda_features
from gpu import cases
from gpu.cases import Case

if not {HOPPER, NVRTC} <= cuda_features():
    pytest.skip("needs a Hopper GPU and NVRTC", allow_module_level=True)

pytestmark = pytest.mark.gpu
PROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count

EXACT = [
    replace(case, M=max(case.M, 5))
    for case in cases.matrix() + cases.shapes()
    if not case.float_scales and (case.group_size is None or case.group_size == 32 or case.group_size % 64 == 0)
]
# Several rounds, and last rounds that are cut; rows of results that TMA does not take, rows of tokens likewise.
EXACT += [
    Case(bits, 128, symmetric=False, M=M, N=N, K=K, bias=M % 2 == 1)
    for bits, M, N, K in (
        (4, 300, 12288, 2048), (4, 512, 4096, 4096), (4, 2048, 5304, 1024), (4, 129, 203, 4093), (3, 700, 1003, 1000),
        (2, 1030, 4104, 512), (8, 257, 8200, 1024), (4, 1, 1, 1), (4, 8192, 264, 128),
    )
]  # fmt: skip
# ROWS, TOKENS, CLUSTER, STAGES, BAND, pieces
TILES = [
    (128, 64, 1, None, 16, 1), (128, 64, 2, 2, 3, 2), (128, 80, 2, None, 1, 3), (128, 128, 1, 3, 16, 5),
    (128, 128, 2, None, 16, 1), (128, 128, 4, None, 2, 4), (128, 208, 2, None, 16, 2), (128, 256, 1, 2, 16, 1),
    (128, 256, 2, None, 2, 3), (128, 256, 4, None, 16, 2), (256, 64, 2, None, 16, 2), (256, 112, 1, 3, 16, 1),
    (256, 128, 2, None, 16, 16), (256, 144, 2, 2, 1, 1), (256, 160, 2, None, 16, 3), (256, 160, 1, None, 16, 1),
]  # fmt: skip
ONE_HOT = [
    Case(bits, 32 if dtype == torch.bfloat16 else None, False, dtype, N=130, K=256)
    for bits in cases.BITS
    for dtype in cases.DTYPES
]
ACCURACY = [Case(bits, 128, bits != 4, dtype, M=300, N=1024, K=4096) for bits in cases.BITS for dtype in cases.DTYPES]
SHARED_K = Case(4, 128, symmetric=False, M=300, N=512, K=4096)  # few tiles, in several pieces each


def configuration(case: Case, tiles: tuple[int, int, int, int | None, int, int] | None = None) -> Config:
    c = choose(case.M, case.kind, PROCESSORS)
    return c if tiles is None else replace(tile(c, *tiles[:3]), STAGES=tiles[3], BAND=tiles[4])


def of_tile(case: Case) -> list[Case]:
    """Over several rounds of tiles with ragged edges; results written through TMA and value by value."""
    return [
        replace(case, M=150, N=5300, K=424),
        replace(case, M=700, N=5303, K=840, bias=True),
        replace(case, M=1100, N=5304, K=1088, symmetric=False, bias=True),
    ]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Every kernel compiled once, on all cores."""
    every = [configuration(case) for case in EXACT + ACCURACY + [replace(c, M=c.K) for c in ONE_HOT]]
    every += [configuration(case, t) for t in TILES for bits in (4, 8) for case in of_tile(Case(bits, 64))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(Config.cubin, dict.fromkeys(every)))


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_exact(case: Case, poison: None) -> None:
    cases.check_exact(many_tokens.linear, case)


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_tile(tiles: tuple[int, int, int, int | None, int, int], bits: int, poison: None) -> None:
    for case in of_tile(Case(bits, 64)):
        linear = partial(many_tokens.linear, config=configuration(case, tiles), cuts=tiles[5])
        cases.check_exact(linear, case)


def test_divided_problems_are_divided() -> None:
    assert divide(SHARED_K.M, SHARED_K.N, SHARED_K.K, configuration(SHARED_K), PROCESSORS).numbers
    forced = [
        divide(case.M, case.N, case.K, configuration(case, t), PROCESSORS, t[5])
        for t in TILES
        for case in of_tile(Case(4, 64))
    ]
    assert any(d.whole and d.cuts > 1 for d in forced), "whole tiles and pieces in one launch"
    assert any(d.items - d.whole > d.blocks for d in forced), "several pieces to a cluster"


@pytest.mark.parametrize("case", ONE_HOT, ids=str)
def test_one_hot(case: Case, poison: None) -> None:
    cases.check_one_hot(many_tokens.linear, case)


@pytest.mark.parametrize("case", ACCURACY, ids=str)
def test_error_is_that_of_cublas(case: Case) -> None:
    cases.check_error(many_tokens.linear, case)


@pytest.mark.parametrize("M", [65, 300, 2048])
@pytest.mark.parametrize("cuts", [1, 4])
def test_repeats(M: int, cuts: int) -> None:
    cases.check_repeats(partial(many_tokens.linear, cuts=cuts), replace(SHARED_K, M=M, N=5304))


@pytest.mark.parametrize("cuts", [1, 3])
def test_pieces_in_any_number_are_near(cuts: int) -> None:
    """Other pieces add up in another order, and to nothing else."""
    f, x = a_weight(SHARED_K), an_input(SHARED_K)
    y = many_tokens.linear(x, f, cuts=cuts).double()
    exact = x.double() @ dequantize(f, torch.bfloat16).double().t()
    assert cases.relative(y, exact) < 3e-3


@pytest.mark.parametrize("cuts", [1, 4])
def test_graph(cuts: int, poison: None) -> None:
    f = a_weight(SHARED_K)
    x = [an_input(SHARED_K) for _ in range(4)]
    cases.check_graph(lambda x: many_tokens.linear(x, f, cuts=cuts), x[0], x[1:])


@pytest.mark.parametrize(("M", "N", "K"), [(128, 4096, 4096), (300, 4096, 4096), (512, 8192, 4096)])
def test_overlapping_launches_write_every_tile(M: int, N: int, K: int) -> None:
    """A chain of launches in a graph, each fed with the one before, beside which it begins; all results kept, and
    poisoned before each replay."""
    there, back = (
        [random(*shape, 4, 128, True, torch.bfloat16, "cuda") for _ in range(2)] for shape in ((N, K), (K, N))
    )
    x = torch.randn(M, K, device="cuda").to(torch.bfloat16)
    torch.cuda.synchronize()

    def chain(apart: bool) -> list[Tensor]:
        results = [x]
        for i in range(12):
            results.append(many_tokens.linear(results[-1], (back if i % 2 else there)[i // 2 % 2]))
            if apart:
                torch.cuda.synchronize()
        return results[1:]

    expected = chain(apart=True)
    assert expected[-1].isfinite().all() and expected[-1].abs().max() > 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(apart=False)
    for _ in range(20):
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        for i, (y, right) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(y, right), f"launch {i}: {int(y.isnan().sum())} of {y.numel()} values were not written"


def test_two_streams() -> None:
    """Launches beside each other on two streams, both with pieces: counters are not shared."""
    f, x = a_weight(SHARED_K), [an_input(SHARED_K) for _ in range(2)]
    expected = [many_tokens.linear(one, f, cuts=4) for one in x]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in x], []
    for _ in range(20):
        for one, stream in zip(x, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(many_tokens.linear(one, f, cuts=4))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i % 2]) for i, y in enumerate(found))


def test_an_unaligned_view_of_tokens() -> None:
    f = a_weight(SHARED_K)
    whole = torch.randn(SHARED_K.M * SHARED_K.K + 1, device="cuda").to(SHARED_K.dtype)
    x = whole[1:].view(SHARED_K.M, SHARED_K.K)
    assert torch.equal(many_tokens.linear(x, f), many_tokens.linear(x.clone(), f))


def test_no_tokens() -> None:
    y = many_tokens.linear(torch.empty(0, SHARED_K.K, dtype=SHARED_K.dtype, device="cuda"), a_weight(SHARED_K))
    assert tuple(y.shape) == (0, SHARED_K.N)


@pytest.mark.parametrize("N", [2000, 2001])
def test_offsets_beyond_32_bits(N: int) -> None:
    """More than 2^31 outputs: the last rows are right."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    case = Case(4, 64, M=1_100_000, N=N, K=64)
    qt, last = cases.weight(case), cases.integers(3, case.K, case.dtype)
    x = torch.zeros(case.M, case.K, dtype=case.dtype, device="cuda")
    x[-3:] = last
    y = many_tokens.linear(x, cases.on(pack(qt, case.dtype), "cuda"))
    assert y.numel() > 1 << 31
    cases.assert_equal(y[-3:], cases.exact(last, qt), "last rows")
    assert not y[:100].any()


@pytest.mark.skipif(torch.cuda.get_device_properties(0).total_memory < 24 << 30, reason="needs 24 GB")
def test_a_weight_beyond_2_gib() -> None:
    cases.check_large_weight(many_tokens.linear, 150)


def test_an_unloaded_kernel_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"not loaded yet.*run the linear once"):
        many_tokens.kernel(replace(configuration(SHARED_K), BAND=7), 0)


def a_weight(case: Case) -> Fragments:
    return cases.on(pack(cases.weight(case, powers=False), case.dtype), "cuda")


def an_input(case: Case) -> Tensor:
    return torch.randn(case.M, case.K, device="cuda").to(case.dtype)
