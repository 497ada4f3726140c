"""Packed linears as they are chosen on this GPU, from QuantizedTensor to QuantLinear, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.kernels import cuda, dispatch, ops
from bitwright.kernels.cuda import FragmentWeight, GluonWeight, HopperWeight, TritonWeight
from bitwright.kernels.fragments import dequantize, pack, unpack
from bitwright.kernels.problem import GLUON, HOPPER, NVRTC, Problem, cuda_features
from bitwright.nn.embedding import QuantEmbedding
from bitwright.nn.linear import QuantLinear
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SCHEMES = ("w4a16-g64", "w4a16-g32-asym", "w3a16-g128", "w2a16-g64-asym", "w8a16", "w4a16-asym")
SHAPE = (200, 328)  # no multiple of any tile; every kernel compiles for minutes over two shapes and all pairs below
DTYPE = {text: (torch.bfloat16, torch.float16)[i % 2] for i, text in enumerate(SCHEMES)}


def random_weight(text: str, N: int, K: int, scale_dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    w = Scheme.parse(text).weight
    generator = torch.Generator().manual_seed(N * K)
    grid = (N, w.num_groups(K))
    codes = torch.randint(w.qmin, w.qmax + 1, (N, K), generator=generator).to(torch.int8)
    zero = torch.randint(w.qmin, w.qmax + 1, grid, generator=generator).to(torch.int8)
    scale = (torch.randn(grid, generator=generator) * 0.02).to(scale_dtype)
    return QuantizedTensor(codes, scale, None if w.symmetric else zero, w)


def activations(M: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype).cuda()


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def candidates(problem: Problem) -> list[type[FragmentWeight]]:
    kinds = [k for k in (HopperWeight, GluonWeight, TritonWeight) if k.refuse(problem) is None]
    if not kinds:
        pytest.skip(f"no kernel runs here: {dispatch.explain(problem)}")
    return kinds


def test_fragments_are_the_same_on_both_sides() -> None:
    for text in SCHEMES:
        qt = random_weight(text, 200, 328)
        here = pack(qt, torch.bfloat16)
        zero = None if qt.zero_point is None else qt.zero_point.cuda()
        there = pack(replace(qt, codes=qt.codes.cuda(), scale=qt.scale.cuda(), zero_point=zero), torch.bfloat16)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here.tensors, there.tensors, strict=True))
        assert torch.equal(unpack(there).cpu(), qt.codes)


@pytest.mark.parametrize("text", SCHEMES)
def test_product(text: str) -> None:
    """Few and many tokens, with a bias, no further from float64 and the weight as it is than 1.2 times cuBLAS."""
    (N, K), dtype = SHAPE, DTYPE[text]
    qt = random_weight(text, N, K, dtype)
    problem = Problem.of(qt, Scheme.parse(text), dtype, "cuda")
    weight, bias = qt.dequantize(dtype).cuda(), torch.randn(N).to(dtype).cuda()
    unrounded = qt.dequantize(torch.float64).cuda()
    zero = None if qt.zero_point is None else qt.zero_point.cuda()
    moved = replace(qt, codes=qt.codes.cuda(), scale=qt.scale.cuda(), zero_point=zero)
    for kind in candidates(problem):
        packed = kind.prepare(moved, problem)
        assert packed.linear(activations(0, K, dtype), bias).shape == (0, N)
        for M in (3, 100):
            x = activations(M, K, dtype)
            exact = x.double() @ unrounded.t() + bias.double()
            limit = 1.2 * relative(torch.nn.functional.linear(x, weight, bias), exact) + 1e-4
            assert relative(packed.linear(x, bias), exact) <= limit, (kind.NAME, M)
            packed.gemm_above = 0
            assert relative(packed.linear(x, bias), exact) <= limit, ("dequantize", M)
            packed.gemm_above = cuda.gemm_above(problem, kind.NAME)


@pytest.mark.parametrize("text", SCHEMES)
def test_the_weight_is_exact(text: str) -> None:
    qt = random_weight(text, *SHAPE, DTYPE[text])
    packed, choice = dispatch.prepare(qt, Scheme.parse(text), torch.bfloat16, "cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(packed.dequantize(dtype).cpu(), qt.dequantize(dtype)), (choice.name, dtype)
    index = torch.tensor([SHAPE[0] - 1, 0, 9, 9], device="cuda")
    assert torch.equal(packed.rows(index).cpu(), qt.dequantize(torch.bfloat16)[index.cpu()])


@pytest.mark.parametrize("text", ["w4a16-g64", "w3a16-g32-asym"])
def test_opcheck(text: str) -> None:
    w = Scheme.parse(text).weight
    qt = random_weight(text, 64, 192)
    zero = None if qt.zero_point is None else qt.zero_point.cuda()
    f = pack(replace(qt, codes=qt.codes.cuda(), scale=qt.scale.cuda(), zero_point=zero), torch.bfloat16)
    kernels = ["triton", "dequantize"] + ["gluon"] * ({HOPPER, GLUON} <= cuda_features())
    kernels += ["hopper"] * ({HOPPER, GLUON, NVRTC} <= cuda_features())
    for kernel in kernels:
        for M in (0, 5):
            given = (activations(M, 192), list(f.words), f.scale, f.zero, None, 64, w.bits, f.group_size, kernel)
            torch.library.opcheck(ops.fragment_linear, given)
    given = (list(f.words), f.scale, f.zero, 64, 192, w.bits, f.group_size, torch.float32)
    torch.library.opcheck(ops.fragment_dequantize, given)
    assert torch.equal(ops.fragment_dequantize(*given), dequantize(f, torch.float32))


@pytest.mark.parametrize("compiled", [False, True])
def test_modules(compiled: bool) -> None:
    scheme = Scheme.parse("w4a16-g64")
    qt, bias = random_weight("w4a16-g64", 256, 512), torch.randn(256)
    layer = QuantLinear.from_quantized(qt, scheme, bias, device="cuda")
    assert layer.choice.name in ("hopper", "gluon", "triton") and layer.packed.device.type == "cuda"
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    weight = qt.dequantize(torch.bfloat16).cuda().double()
    with torch.no_grad():
        for shape in ((512,), (2, 3, 512), (2, 0, 512)):
            x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
            expected = x.bfloat16().double() @ weight.t() + bias.bfloat16().cuda().double()
            # Kernels for few tokens do not round weights to bf16: 512 roundings that one side has, not the other.
            torch.testing.assert_close(run(x).double(), expected, rtol=8e-3, atol=2e-2)
    embedding = QuantEmbedding.from_quantized(qt, scheme, device="cuda")
    index = torch.tensor([[255, 0], [17, 17]], device="cuda")
    assert torch.equal(embedding(index).cpu(), qt.dequantize(torch.bfloat16)[index.cpu()])


def test_a_graph_replays_linear_and_embedding() -> None:
    scheme = Scheme.parse("w4a16-g64-asym")
    qt = random_weight("w4a16-g64-asym", 256, 256)
    layer = QuantLinear.from_quantized(qt, scheme, device="cuda")
    embedding = QuantEmbedding.from_quantized(qt, scheme, device="cuda")
    index = torch.tensor([3, 200], device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        layer(embedding(index))  # kernels are compiled outside the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = layer(embedding(index))
    for rows in ([3, 200], [0, 255], [7, 7]):
        index.copy_(torch.tensor(rows))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(embedding(index)))


def test_activation_order() -> None:
    scheme = Scheme.parse("w4a16-g64")
    qt = random_weight("w4a16-g64", 128, 256)
    permuted = replace(qt, order=torch.randperm(256, generator=torch.Generator().manual_seed(0)))
    packed, _ = dispatch.prepare(permuted, scheme, torch.bfloat16, "cuda")
    assert torch.equal(packed.dequantize().cpu(), permuted.dequantize())
    one_hot = torch.eye(256, dtype=torch.bfloat16, device="cuda")
    got = torch.cat([packed(part) for part in one_hot.split(16)])
    assert torch.equal(got.cpu(), permuted.dequantize(torch.bfloat16).t())
