"""The Triton kernels on a GPU: the whole matrix to the last bit, errors against cuBLAS's, repeats, graphs, tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bitwright.kernels import fragments, ops
from bitwright.kernels.fragments import pack, stack
from bitwright.kernels.triton import experts, gemm
from bitwright.kernels.triton.config import Config
from bitwright.kernels.triton.dequantize import dequantize
from gpu import cases
from gpu.cases import Case

pytestmark = pytest.mark.gpu

EXACT = cases.matrix() + cases.shapes()
ONE_HOT = [
    Case(bits, 32 if dtype == torch.bfloat16 else None, False, dtype, N=130, K=256)
    for bits in cases.BITS
    for dtype in cases.DTYPES
] + [Case(4, 64, False, N=130, K=256, float_scales=True), Case(8, 64, False, torch.float16, K=256, float_scales=True)]
STACKS = [
    (Case(bits, group_size, bits in (3, 8), dtype, N=200, K=320), counts)
    for bits, group_size, dtype in (
        (4, 64, torch.bfloat16),
        (3, 32, torch.float16),
        (2, None, torch.bfloat16),
        (8, 128, torch.float16),
    )
    for counts in ((0, 1, 0, 7, 0), (300, 0, 17, 1, 129), (0, 0, 0), (33,))
]
DENSE = [
    Case(bits, group_size, symmetric, dtype, N=200, K=424)
    for bits in cases.BITS
    for group_size, symmetric, dtype in (
        (32, False, torch.bfloat16),
        (128, True, torch.float16),
        (None, False, torch.float16),
        (96, False, torch.bfloat16),
    )
]
ACCURACY = [Case(bits, 128, bits != 4, dtype, N=1024, K=4096) for bits in cases.BITS for dtype in cases.DTYPES]
SHARED_K = replace(ACCURACY[0], N=512)  # few tiles: several programs share the K of each


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Every kernel compiled once, in threads, because one by one takes minutes; what fails here fails again below."""
    work: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(cases.check_exact, (gemm.linear, c)) for c in EXACT]
    work += [(cases.check_one_hot, (gemm.linear, c)) for c in ONE_HOT]
    work += [(cases.check_experts, (experts.linear, c, counts)) for c, counts in STACKS]
    work += [(check_dense, (c,)) for c in DENSE]
    work += [(cases.check_error, (gemm.linear, replace(c, M=M))) for c in ACCURACY for M in (1, 300)]

    def attempt(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        with suppress(Exception):
            job[0](*job[1])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or every one of the pool's threads starts a team of its own
    try:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(attempt, work))
        torch.cuda.synchronize()
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def poison() -> Iterator[None]:
    with cases.poisoned():
        yield


def check_dense(case: Case) -> None:
    weights = [cases.on(pack(cases.weight(case, seed=e, powers=False), case.dtype), "cuda") for e in range(3)]
    expected = [fragments.dequantize(w, case.dtype) for w in weights]
    cases.assert_equal(dequantize(weights[0], case.dtype), expected[0].cpu(), str(case))
    cases.assert_equal(dequantize(stack(weights), case.dtype), torch.stack(expected).cpu(), f"stack of {case}")


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_exact(case: Case, poison: None) -> None:
    cases.check_exact(gemm.linear, case)


@pytest.mark.parametrize("case", ONE_HOT, ids=str)
def test_one_hot(case: Case, poison: None) -> None:
    cases.check_one_hot(gemm.linear, case)


@pytest.mark.parametrize(("case", "counts"), STACKS, ids=str)
def test_experts(case: Case, counts: tuple[int, ...], poison: None) -> None:
    cases.check_experts(experts.linear, case, counts, beyond=3)


def test_experts_that_share_k(poison: None) -> None:
    tiles = Config(BN=128, BM=16, BK=128, warps=8, stages=3, split_k=4)
    case = Case(4, 64, symmetric=False, N=200, K=1000)
    cases.check_experts(lambda x, offsets, f: experts.linear(x, offsets, f, tiles), case, (0, 5, 40, 1))


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dequantize(case: Case, poison: None) -> None:
    check_dense(case)


@pytest.mark.parametrize("M", [1, 300])
@pytest.mark.parametrize("case", ACCURACY, ids=str)
def test_error(case: Case, M: int) -> None:
    cases.check_error(gemm.linear, replace(case, M=M))


@pytest.mark.parametrize("M", [1, 17, 64])
def test_repeats(M: int) -> None:
    cases.check_repeats(gemm.linear, replace(SHARED_K, M=M))


def a_weight(case: Case) -> fragments.Fragments:
    return cases.on(pack(cases.weight(case, powers=False), case.dtype), "cuda")


def inputs(case: Case, count: int) -> list[Tensor]:
    return [torch.randn(case.M, case.K, device="cuda").to(case.dtype) for _ in range(count)]


def test_graph(poison: None) -> None:
    f = a_weight(SHARED_K)
    cases.check_graph(lambda x: gemm.linear(x, f), *((x := inputs(SHARED_K, 4))[0], x[1:]))


def test_graph_of_experts_follows_the_routing() -> None:
    case = Case(4, 64, N=256, K=1024)
    f = cases.on(stack([pack(cases.weight(case, seed=e, powers=False), case.dtype) for e in range(4)]), "cuda")
    x = torch.randn(24, case.K, device="cuda").to(case.dtype)
    offsets = torch.tensor([0, 24, 24, 24, 24], dtype=torch.int32, device="cuda")
    experts.linear(x, offsets, f)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = experts.linear(x, offsets, f)
    for routing in ([0, 0, 0, 0, 24], [0, 6, 12, 18, 24], [0, 1, 1, 24, 24]):
        offsets.copy_(torch.tensor(routing))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, experts.linear(x, offsets, f)), routing


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
    return x, list(f.words), f.scale, f.zero, bias, case.N, case.bits, f.group_size, "triton"


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
    """x that starts in the middle of a buffer, at an address that no vector load takes."""
    case = replace(SHARED_K, M=3)
    f = a_weight(case)
    whole = torch.randn(case.M * case.K + 1, device="cuda").to(case.dtype)
    x = whole[1:].view(case.M, case.K)
    assert torch.equal(gemm.linear(x, f), gemm.linear(x.clone(), f))
