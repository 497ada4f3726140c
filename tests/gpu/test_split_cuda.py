"""Split weights on a GPU: int8 tensor cores and cuSPARSELt, bit for bit what the CPU gives."""

from __future__ import annotations

import re

import pytest
import torch
from split_cases import PlainInput, random_split_tensor
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bitwright.kernels import reference
from bitwright.kernels.problem import CUSPARSELT, HOPPER, NVRTC, Problem, cuda_features
from bitwright.kernels.sparse_mma import SparseMma
from bitwright.kernels.split_cuda import Int8Weight, SplitMma
from bitwright.kernels.split_sparse import SparseValues, SplitSparse
from bitwright.nn.linear import QuantLinear
from bitwright.split import SplitTensor
from gpu import cases

pytestmark = pytest.mark.gpu

DENSE = ["w4a4", "w4a8", "w8a8-rot", "w4a4-24", "w4a4-o40", "w8a8-o16"]
SPARSE = ["w4a4-24", "w8a8-24", "w4a4-o40-24", "w4a8-o16-24"]
TOKENS = [0, 1, 31, 32, 300]
N, K = 200, 1000


def prepared(kind: type[Int8Weight], text: str, dtype: torch.dtype) -> tuple[Int8Weight, SplitTensor]:
    if kind is SplitSparse and CUSPARSELT not in cuda_features():
        pytest.skip("this torch brings no cuSPARSELt")
    if kind is SparseMma and not {HOPPER, NVRTC} <= cuda_features():
        pytest.skip("needs a Hopper GPU and NVRTC")
    tensor = random_split_tensor(N, K, text, shuffled=True, dtype=dtype)
    moved = tensor.to("cuda")
    problem = Problem.of(moved, tensor.scheme, dtype, "cuda")
    assert kind.refuse(problem) is None
    return kind(problem, moved, PlainInput(moved.split)), tensor


def activations(M: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


KINDS = [(SplitMma, text) for text in DENSE] + [(kind, text) for kind in (SplitSparse, SparseMma) for text in SPARSE]


@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_against_the_reference(kind: type[Int8Weight], text: str, dtype: torch.dtype, M: int, poison: None) -> None:
    packed, tensor = prepared(kind, text, dtype)
    x, bias = activations(M, dtype), torch.randn(N).to(dtype)
    expected = reference.split_linear(x, tensor)
    y = packed(x.cuda())
    with_bias = packed.linear(x.cuda(), bias.cuda())
    assert y.dtype == with_bias.dtype == dtype
    if tensor.outliers.shape[1]:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.cpu().float(), expected, rtol=eps, atol=1e-3)
        torch.testing.assert_close(with_bias.cpu().float(), expected + bias.float(), rtol=eps, atol=1e-3)
    else:
        cases.assert_equal(y, expected.to(dtype), f"{kind.NAME} {text}")
        cases.assert_equal(with_bias, (expected + bias.float()).to(dtype), f"{kind.NAME} {text} with a bias")


@pytest.mark.parametrize("M", [0, 1, 64, 65, 300, 1000])
@pytest.mark.parametrize("text", SPARSE)
def test_sparse_in_pieces(text: str, M: int, poison: None) -> None:
    """Tokens in pieces of 256: the bits of tokens in one piece."""
    if CUSPARSELT not in cuda_features():
        pytest.skip("this torch brings no cuSPARSELt")
    rows = 1000
    tensor = random_split_tensor(rows, K, text, shuffled=True)
    moved = tensor.to("cuda")
    given = Problem.of(moved, tensor.scheme, torch.bfloat16, "cuda"), moved, PlainInput(moved.split)
    whole, cut = SplitSparse(*given), SplitSparse(*given, most_sums=rows * 256)
    x, bias = activations(M, torch.bfloat16).cuda(), torch.randn(rows).bfloat16().cuda()
    assert torch.equal(cut.linear(x, bias), whole.linear(x, bias))
    assert torch.equal(cut.dequantize(), moved.dequantize())
    if M:
        cases.check_graph(cut, x, [activations(M, torch.bfloat16, seed).cuda() for seed in (1, 2)])


@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_weights_come_back(kind: type[Int8Weight], text: str) -> None:
    packed, tensor = prepared(kind, text, torch.bfloat16)
    expected = tensor.to("cuda").dequantize()
    assert torch.equal(packed.dequantize(), expected)
    index = torch.tensor([3, 0, N - 1], device="cuda")
    assert torch.equal(packed.rows(index), expected[index].bfloat16())


@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_memory_is_what_is_stated(kind: type[Int8Weight], text: str) -> None:
    packed, tensor = prepared(kind, text, torch.bfloat16)
    indices = tensor.split.base_idx.nbytes + tensor.split.outlier_idx.nbytes
    problem = Problem.of(tensor, tensor.scheme, torch.bfloat16, "cuda")
    stated = float(re.search(r"about (\S+) bits per weight", kind.describe(problem))[1])
    assert (packed.nbytes - indices) * 8 / (N * K) == pytest.approx(stated, abs=0.2 if kind is SplitSparse else 0.01)


@pytest.mark.parametrize("M", [1, 64, 300])
@pytest.mark.parametrize(
    ("kind", "text"), [(SplitMma, "w4a4-o40"), (SplitSparse, "w4a4-o40-24"), (SparseMma, "w4a4-o40-24")]
)
def test_graph_and_repeats(kind: type[Int8Weight], text: str, M: int, poison: None) -> None:
    packed, _ = prepared(kind, text, torch.bfloat16)
    x = [activations(M, torch.bfloat16, seed).cuda() for seed in range(4)]
    first = packed(x[0])
    for _ in range(20):
        assert torch.equal(packed(x[0]), first)
    cases.check_graph(packed, x[0], x[1:])


def test_a_graph_of_a_size_never_seen() -> None:
    """A capture searches for no algorithm."""
    packed, _ = prepared(SplitSparse, "w8a8-24", torch.bfloat16)
    x = activations(100, torch.bfloat16).cuda()
    packed(x)
    wide = activations(700, torch.bfloat16, 1).cuda()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed(wide)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, packed(wide))


@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_sparse_values(dtype: torch.dtype, M: int) -> None:
    if CUSPARSELT not in cuda_features():
        pytest.skip("this torch brings no cuSPARSELt")
    tensor = random_split_tensor(N, K, "w16a16-24", shuffled=True, dtype=dtype).to("cuda")
    problem = Problem.of(tensor, tensor.scheme, dtype, "cuda")
    assert SparseValues.refuse(problem) is None
    packed = SparseValues(problem, tensor)
    assert torch.equal(packed.dequantize(), tensor.dequantize())
    x = activations(M, dtype).cuda()
    y = packed(x)
    assert y.dtype == dtype and tuple(y.shape) == (M, N)
    expected = x.double() @ tensor.dequantize(torch.float64).t()
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("text", ["w4a4-o40-rot", "w8a8-24", "w4a8"])
def test_a_linear_from_the_table(text: str) -> None:
    """Chosen, prepared and run as a model runs it."""
    pytest.importorskip("bitwright.kernels.shared_input")
    tensor = random_split_tensor(N, K, text, shuffled=True)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer = QuantLinear.from_quantized(tensor, tensor.scheme, bias, device="cuda")
    sparse = "int8-sparse-mma" if {HOPPER, NVRTC} <= cuda_features() else "int8-sparse"
    there = {HOPPER, NVRTC} <= cuda_features() or CUSPARSELT in cuda_features()
    assert layer.choice.name == (sparse if there and "24" in text else "int8-mma")
    x = activations(6, torch.bfloat16)
    y = layer(x.view(2, 3, K).cuda())
    assert tuple(y.shape) == (2, 3, N)
    expected = reference.split_linear(x, tensor) + bias.float()
    torch.testing.assert_close(y.view(6, N).cpu().float(), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-3)
