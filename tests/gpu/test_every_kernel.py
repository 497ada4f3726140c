"""What every packed kernel must do beside being right: the same bits again, graphs, streams, tracing, odd addresses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bitwright.kernels import ops
from bitwright.kernels.fragments import Fragments, pack, random, stack
from bitwright.kernels.problem import GLUON, HOPPER, NVRTC, cuda_features
from bitwright.kernels.routing_ops import sort_by_expert
from gpu import cases
from gpu.cases import Case, Experts, Linear

pytestmark = pytest.mark.gpu

SHARED_K = Case(4, 128, symmetric=False, N=512, K=4096)  # few tiles: several programs share the K of each


@dataclass(frozen=True)
class Kernel:
    """One of the kernels of `ops`, by its name and its two functions."""

    name: str
    linear: Linear
    experts: Experts


@pytest.fixture(params=["hopper", "gluon", "triton"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    if request.param == "hopper":
        if not {HOPPER, GLUON, NVRTC} <= cuda_features():
            pytest.skip("the Hopper kernels need a Hopper GPU, a Triton that they know and NVRTC")
        hopper = import_module("bitwright.kernels.hopper")
        return Kernel("hopper", hopper.linear, hopper.experts)
    if request.param == "gluon":
        if not {HOPPER, GLUON} <= cuda_features():
            pytest.skip("the Gluon kernel needs a Hopper GPU and a Triton that it knows")
        gemm = import_module("bitwright.kernels.gluon.gemm")
        return Kernel("gluon", gemm.linear, gemm.experts)
    linear = import_module("bitwright.kernels.triton.gemm").linear
    return Kernel("triton", linear, import_module("bitwright.kernels.triton.experts").linear)


def a_weight(case: Case) -> Fragments:
    return cases.on(pack(cases.weight(case, powers=False), case.dtype), "cuda")


def inputs(case: Case, count: int) -> list[Tensor]:
    return [torch.randn(case.M, case.K, device="cuda").to(case.dtype) for _ in range(count)]


@pytest.mark.parametrize("M", [1, 17, 64, 100, 300])
def test_repeats(kernel: Kernel, M: int) -> None:
    cases.check_repeats(kernel.linear, replace(SHARED_K, M=M))


@pytest.mark.parametrize("M", [1, 64])
def test_graph(kernel: Kernel, M: int, poison: None) -> None:
    case = replace(SHARED_K, M=M)
    f, x = a_weight(case), inputs(case, 4)
    cases.check_graph(lambda x: kernel.linear(x, f, None), x[0], x[1:])


# 5120² is large enough for two programs a processor, and cuts tiles into pieces of odd length.
@pytest.mark.parametrize(("M", "size"), [(1, 4096), (16, 4096), (64, 4096), (256, 4096), (1, 5120), (20, 5120)])
def test_a_chain_waits_for_each_result(kernel: Kernel, M: int, size: int) -> None:
    """Launches that may begin before their predecessor has ended, each fed with its result: as one by one."""
    case = Case(4, 128, M=M, N=size, K=size)
    weights = [random(size, size, 4, 128, True, case.dtype, "cuda") for _ in range(3)]
    torch.cuda.synchronize()

    def chain(x: Tensor, apart: bool) -> Tensor:
        for _ in range(8):
            for f in weights:
                x = kernel.linear(x, f, None)
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


@pytest.mark.parametrize("rows", [4, 24])
def test_graph_of_experts_follows_the_routing(kernel: Kernel, rows: int) -> None:
    case = Case(4, 64, N=256, K=1024)
    f = cases.on(stack([pack(cases.weight(case, seed=e, powers=False), case.dtype) for e in range(4)]), "cuda")
    x = torch.randn(rows, case.K, device="cuda").to(case.dtype)
    offsets = torch.tensor([0, rows, rows, rows, rows], dtype=torch.int32, device="cuda")
    kernel.experts(x, offsets, f)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.experts(x, offsets, f)
    for routing in ([0, 0, 0, 0, rows], [rows * e // 4 for e in range(5)], [0, 1, 1, rows, rows]):
        offsets.copy_(torch.tensor(routing))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, kernel.experts(x, offsets, f)), routing


@pytest.mark.parametrize(("M", "k", "E"), [(1, 2, 8), (1, 8, 128), (16, 2, 8), (128, 8, 256), (513, 2, 8), (512, 2, 8)])
def test_tokens_are_sorted_by_expert(M: int, k: int, E: int, poison: None) -> None:
    cases.check_sort(sort_by_expert, M, k, E)


@pytest.mark.parametrize("T", [2, 32, 300])
def test_settled_offsets_are_those_of_this_replay(kernel: Kernel, T: int) -> None:
    """Two products and an early starter between them, the second promised that the first waited for the offsets; those
    change from replay to replay, and all between is poisoned."""
    from bitwright.kernels.triton.elementwise import relu

    generator = torch.Generator("cuda").manual_seed(0)
    up, down = (random(N, K, 4, 128, True, torch.bfloat16, "cuda", 8) for N, K in ((6144, 2048), (2048, 6144)))
    x = torch.randn(T, 2048, device="cuda", generator=generator).bfloat16()
    wanted = torch.zeros(9, dtype=torch.int32, device="cuda")
    kept: list[Tensor] = []

    def chain(settled: bool, apart: bool) -> Tensor:
        y = x
        for _ in range(4):
            offsets = wanted.clone()
            inner = kernel.experts(y, offsets, up)
            between = relu(inner)
            if apart:
                torch.cuda.synchronize()
            y = kernel.experts(between, offsets, down, settled=settled)
            kept.extend((offsets, inner, between, y))
            if apart:
                torch.cuda.synchronize()
        return y

    chain(True, True)
    torch.cuda.synchronize()
    kept.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(True, False)
    poisoned = list(kept)
    for _ in range(20):
        cuts = torch.randint(0, T + 1, (7,), device="cuda", generator=generator).sort().values
        wanted[1:8], wanted[8] = cuts.int(), T
        expected = chain(False, True)
        assert expected.isfinite().all() and expected.abs().max() > 0
        for t in poisoned:
            t.fill_(float("nan") if t.is_floating_point() else 0)
        graph.replay()
        assert torch.equal(y, expected)


def test_graphs_and_eager_calls_side_by_side(kernel: Kernel) -> None:
    """Two graphs on streams of their own beside eager calls on a third, all on one weight: nothing is shared."""
    f, x = a_weight(SHARED_K), inputs(SHARED_K, 3)
    expected = [kernel.linear(one, f, None) for one in x]
    torch.cuda.synchronize()
    graphs, results = [], []
    for one in x[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([kernel.linear(one, f, None) for _ in range(20)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(5):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = [kernel.linear(x[2], f, None) for _ in range(20)]
        torch.cuda.synchronize()
        for outputs, right in zip([*results, eager], expected, strict=True):
            assert all(torch.equal(y, right) for y in outputs)


def operands(case: Case, M: int, kernel: str) -> tuple[Any, ...]:
    f = a_weight(case)
    x = torch.randn(M, case.K, device="cuda").to(case.dtype)
    bias = torch.randn(case.N, device="cuda").to(case.dtype)
    return x, list(f.words), f.scale, f.zero, bias, case.N, case.bits, f.group_size, kernel


@pytest.mark.parametrize("bits", [3, 4])
def test_opcheck(kernel: Kernel, bits: int) -> None:
    torch.library.opcheck(ops.fragment_linear, operands(Case(bits, 64, symmetric=bits == 3), 3, kernel.name))


def test_compile(kernel: Kernel) -> None:
    """One graph under torch.compile, with the operator opaque in it."""
    x, *rest = operands(Case(4, 128, symmetric=False, N=256, K=512), 4, kernel.name)

    def layer(x: Tensor) -> Tensor:
        return ops.fragment_linear(torch.nn.functional.silu(x), *rest) * 2

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-2, atol=1e-2)


def test_an_unaligned_view_of_tokens(kernel: Kernel) -> None:
    """x that starts in the middle of a buffer, at an address that no wide load takes."""
    case = replace(SHARED_K, M=3)
    f = a_weight(case)
    whole = torch.randn(case.M * case.K + 1, device="cuda").to(case.dtype)
    x = whole[1:].view(case.M, case.K)
    assert torch.equal(kernel.linear(x, f, None), kernel.linear(x.clone(), f, None))
