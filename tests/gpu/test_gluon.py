"""The Hopper kernel on a GPU: the whole matrix to the last bit, errors against cuBLAS's, repeats, graphs, tracing."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from bitwright.kernels.fragments import Kind, random
from bitwright.kernels.gluon import gemm
from bitwright.kernels.gluon.config import choose, divide
from gpu import cases
from gpu.cases import Case

pytestmark = pytest.mark.gpu
PROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count

EXACT = [
    case
    for case in cases.matrix() + cases.shapes()
    if not case.float_scales and (case.group_size is None or case.group_size == 32 or case.group_size % 64 == 0)
]
# Enough tiles for every processor, tiles cut in two and in many, and both ways of adding up the pieces.
DIVIDED = [Case(bits, 128, symmetric=False, M=M, N=1096, K=4096) for bits in cases.BITS for M in (1, 16, 64, 100)]
DIVIDED += [Case(4, 64, M=M, N=N, K=1024) for M in (2, 40, 256, 300) for N in (8456,)]
# Many tokens: the last round cut along K, in tiles of either kind.
DIVIDED += [Case(4, 128, M=M, N=N, K=K) for M, N, K in ((300, 12288, 2048), (512, 12288, 4096), (340, 4104, 8192))]
ONE_HOT = [
    Case(bits, 32 if dtype == torch.bfloat16 else None, False, dtype, N=130, K=256)
    for bits in cases.BITS
    for dtype in cases.DTYPES
]
STACKS = [
    (Case(bits, group_size, bits in (3, 8), dtype, N=200, K=320), counts)
    for bits, group_size, dtype in ((4, 64, torch.bfloat16), (8, 64, torch.float16), (3, 32, torch.bfloat16))
    for counts in ((0, 1, 0, 7, 0), (300, 0, 17, 1, 129), (0, 0, 0), (33,))
] + [
    (Case(4, 64, N=200, K=320), (0,) * 60 + (3,) + (0,) * 66 + (17,)),  # more experts than a warp has lanes
    (Case(4, 64, N=200, K=328), (5, 0, 40)),  # a ragged last group: the next row of scales is another expert's
    (Case(4, 64, N=136, K=328), (5, 0, 140)),  # the last tile takes bands of another expert
    (Case(3, 64, N=136, K=328), (700, 0, 800)),
    (Case(4, 64, N=200, K=332), (5, 0, 140)),  # rows of x that TMA cannot take as they are
]
ACCURACY = [Case(bits, 128, bits != 4, dtype, N=1024, K=4096) for bits in cases.BITS for dtype in cases.DTYPES]
SHARED_K = replace(ACCURACY[0], N=512)  # few tiles: several programs share the K of each


def _compile(job: tuple[Case, tuple[int, ...] | None]) -> None:
    """In a process of its own, for the compiled kernel that it leaves on disk; what fails here fails again below."""
    case, counts = job
    group_size = case.group_size or case.K
    f = random(case.N, case.K, case.bits, group_size, case.symmetric, case.dtype, "cuda", counts and len(counts))
    with suppress(Exception):
        if counts is None:
            x = torch.zeros(case.M, case.K, dtype=case.dtype, device="cuda")
            gemm.linear(x, f, torch.zeros(case.N, dtype=case.dtype, device="cuda") if case.bias else None)
        elif sum(counts):
            offsets = torch.zeros(len(counts) + 1, dtype=torch.int32, device="cuda")
            gemm.experts(torch.zeros(sum(counts) + 3, case.K, dtype=case.dtype, device="cuda"), offsets, f)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Every kernel compiled once, in one process a core, because one by one takes minutes."""
    jobs: dict[Any, tuple[Case, tuple[int, ...] | None]] = {}
    for case in EXACT + DIVIDED + [replace(c, M=c.K) for c in ONE_HOT]:
        config = choose(case.M, case.kind, PROCESSORS)
        jobs[config, case.N % 16 == 0, case.K % 16 == 0] = (case, None)
    for case, counts in STACKS:
        jobs[case, counts] = (case, counts)
    workers = min(14, len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        list(pool.map(_compile, jobs.values()))


@pytest.mark.parametrize("case", EXACT + DIVIDED, ids=str)
def test_exact(case: Case, poison: None) -> None:
    cases.check_exact(gemm.linear, case)


def test_divided_problems_are_divided() -> None:
    config = choose(512, Kind(12288, 4096, 4, 128, torch.bfloat16), PROCESSORS)
    assert divide(512, 12288, 4096, config, PROCESSORS).partial_size


@pytest.mark.parametrize("case", ONE_HOT, ids=str)
def test_one_hot(case: Case, poison: None) -> None:
    cases.check_one_hot(gemm.linear, case)


@pytest.mark.parametrize(("case", "counts"), STACKS, ids=str)
def test_experts(case: Case, counts: tuple[int, ...], poison: None) -> None:
    cases.check_experts(gemm.experts, case, counts, beyond=3)


@pytest.mark.parametrize("M", [1, 300])
@pytest.mark.parametrize("case", ACCURACY, ids=str)
def test_error(case: Case, M: int) -> None:
    cases.check_error(gemm.linear, replace(case, M=M))


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 4096, 4096), (16, 22016, 4096), (48, 4096, 4096), (48, 22016, 4096), (100, 4096, 4096), (256, 8192, 8192)],
)
def test_overlapping_launches_write_every_tile(M: int, N: int, K: int) -> None:
    """A chain of launches in a graph, every result kept and poisoned before each replay.

    Each begins beside the one before. What is not written stays NaN, also where an older result would hide it.
    """
    there, back = (
        [random(*shape, 4, 128, True, torch.bfloat16, "cuda") for _ in range(2)] for shape in ((N, K), (K, N))
    )
    x = torch.randn(M, K, device="cuda").to(torch.bfloat16)

    def chain(apart: bool) -> list[torch.Tensor]:
        results = [x]
        for i in range(12):
            results.append(gemm.linear(results[-1], (back if i % 2 else there)[i // 2 % 2], None))
            if apart:
                torch.cuda.synchronize()
        return results[1:]

    expected = chain(apart=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(apart=False)
    for _ in range(20):
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        for i, (y, right) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(y, right), f"launch {i}: {int(y.isnan().sum())} of {y.numel()} values were not written"
