"""The Hopper kernel on a GPU: the whole matrix to the last bit, errors against cuBLAS's, repeats, graphs, tracing."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from bitwright.kernels import ops
from bitwright.kernels.fragments import Fragments, pack, random, stack
from bitwright.kernels.gluon import gemm
from bitwright.kernels.gluon.config import choose
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
        group_size = min(case.group_size or case.K, case.K)
        config = choose(
            case.M, case.N, case.K, case.bits, group_size, case.dtype, not case.symmetric, case.bias, PROCESSORS
        )
        jobs[config, case.N % 16 == 0, case.K % 16 == 0] = (case, None)
    for case, counts in STACKS:
        jobs[case, counts] = (case, counts)
    workers = min(14, len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        list(pool.map(_compile, jobs.values()))


@pytest.fixture
def poison() -> Iterator[None]:
    with cases.poisoned():
        yield


@pytest.mark.parametrize("case", EXACT + DIVIDED, ids=str)
def test_exact(case: Case, poison: None) -> None:
    cases.check_exact(gemm.linear, case)


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


@pytest.mark.parametrize("M", [1, 17, 64, 100, 300])
def test_repeats(M: int) -> None:
    cases.check_repeats(gemm.linear, replace(SHARED_K, M=M))


def a_weight(case: Case) -> Fragments:
    return cases.on(pack(cases.weight(case, powers=False), case.dtype), "cuda")


def inputs(case: Case, count: int) -> list[Tensor]:
    return [torch.randn(case.M, case.K, device="cuda").to(case.dtype) for _ in range(count)]


@pytest.mark.parametrize("M", [1, 64])
def test_graph(M: int, poison: None) -> None:
    case = replace(SHARED_K, M=M)
    f, x = a_weight(case), inputs(case, 4)
    cases.check_graph(lambda x: gemm.linear(x, f), x[0], x[1:])


@pytest.mark.parametrize("M", [1, 16, 64, 256])
def test_a_chain_waits_for_each_result(M: int) -> None:
    """Launches that may begin before their predecessor has ended, each fed with its result: as one by one."""
    case = Case(4, 128, M=M, N=4096, K=4096)
    weights = [a_weight(case) for _ in range(3)]

    def chain(x: Tensor, apart: bool) -> Tensor:
        for _ in range(8):
            for f in weights:
                x = gemm.linear(x, f)
                if apart:
                    torch.cuda.synchronize()
        return x

    x = inputs(case, 1)[0]
    expected = chain(x, apart=True)
    assert expected.isfinite().all() and expected.abs().max() > 0
    for _ in range(20):
        assert torch.equal(chain(x, apart=False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x, apart=False)
    for _ in range(50):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def test_graph_of_experts_follows_the_routing() -> None:
    case = Case(4, 64, N=256, K=1024)
    f = cases.on(stack([pack(cases.weight(case, seed=e, powers=False), case.dtype) for e in range(4)]), "cuda")
    x = torch.randn(24, case.K, device="cuda").to(case.dtype)
    offsets = torch.tensor([0, 24, 24, 24, 24], dtype=torch.int32, device="cuda")
    gemm.experts(x, offsets, f)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gemm.experts(x, offsets, f)
    for routing in ([0, 0, 0, 0, 24], [0, 6, 12, 18, 24], [0, 1, 1, 24, 24]):
        offsets.copy_(torch.tensor(routing))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, gemm.experts(x, offsets, f)), routing


def test_graphs_and_eager_calls_side_by_side() -> None:
    """Two graphs on streams of their own beside eager calls on a third, all on one weight: nothing is shared."""
    f, x = a_weight(SHARED_K), inputs(SHARED_K, 3)
    expected = [gemm.linear(one, f) for one in x]
    torch.cuda.synchronize()
    graphs, results = [], []
    for one in x[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([gemm.linear(one, f) for _ in range(20)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(5):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = [gemm.linear(x[2], f) for _ in range(20)]
        torch.cuda.synchronize()
        for outputs, right in zip([*results, eager], expected, strict=True):
            assert all(torch.equal(y, right) for y in outputs)


def operands(case: Case, M: int) -> tuple[Any, ...]:
    f = a_weight(case)
    x = torch.randn(M, case.K, device="cuda").to(case.dtype)
    bias = torch.randn(case.N, device="cuda").to(case.dtype)
    return x, list(f.words), f.scale, f.zero, bias, case.N, case.bits, f.group_size, "gluon"


@pytest.mark.parametrize("bits", [3, 4])
def test_opcheck(bits: int) -> None:
    torch.library.opcheck(ops.fragment_linear, operands(Case(bits, 64, symmetric=bits == 3), 3))


def test_compile() -> None:
    """One graph under torch.compile, with the operator opaque in it."""
    x, *rest = operands(Case(4, 128, symmetric=False, N=256, K=512), 4)

    def layer(x: Tensor) -> Tensor:
        return ops.fragment_linear(torch.nn.functional.silu(x), *rest) * 2

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-2, atol=1e-2)


def test_an_unaligned_view_of_tokens() -> None:
    case = replace(SHARED_K, M=3)
    f = a_weight(case)
    whole = torch.randn(case.M * case.K + 1, device="cuda").to(case.dtype)
    x = whole[1:].view(case.M, case.K)
    assert torch.equal(gemm.linear(x, f), gemm.linear(x.clone(), f))
