"""Split weights as they are prepared for a GPU, without one: what is chosen and why, and operators' CPU programs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from split_cases import PlainInput, random_split_tensor
from torch import Tensor

from bitwright.kernels import dispatch, reference, split_cuda, split_sparse
from bitwright.kernels.dequantize import Int8Exact
from bitwright.kernels.int8_fragments import MAX_COLUMNS
from bitwright.kernels.problem import CUSPARSELT, GLUON, HOPPER, TRITON, Problem
from bitwright.kernels.split import SplitDequantized, SplitInteger
from bitwright.kernels.split_cuda import SplitMma
from bitwright.kernels.split_sparse import Compressed, SparseValues, SplitSparse
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

BF16, FP16 = torch.bfloat16, torch.float16
INTEGER = ["w4a4", "w4a8", "w8a8-rot", "w4a4-rot", "w4a4-24", "w8a8-24"]
WITH_OUTLIERS = ["w4a4-o16", "w4a8-o8", "w8a8-o16", "w4a4-o24-24", "w8a8-o32-rot"]


def problem(text: str, N: int = 64, K: int = 256, **changes: Any) -> Problem:
    rest = {"dtype": BF16, "scale_dtype": BF16, "device": "cuda", "features": frozenset({TRITON, CUSPARSELT})} | changes
    return Problem(N=N, K=K, scheme=Scheme.parse(text), **rest)


ON_HOPPER = frozenset({TRITON, GLUON, HOPPER, CUSPARSELT})


def on_cpu(tensor: SplitTensor, dtype: torch.dtype) -> SplitMma:
    N, K = tensor.shape
    return SplitMma(problem(str(tensor.scheme), N, K, dtype=dtype), tensor, PlainInput(tensor.split))


def activations(M: int, K: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(M, K, generator=g) * torch.exp(torch.randn(M, 1, generator=g))).to(dtype)


@pytest.mark.parametrize(
    ("text", "changes", "expected", "why"),
    [
        ("w4a4-o16", {}, SplitMma, "int8 tensor cores"),
        ("w4a8", {"dtype": FP16}, SplitMma, "int8 tensor cores"),
        ("w8a8-rot", {}, SplitMma, "int8 tensor cores"),
        ("w8a8", {}, SplitMma, "int8 tensor cores"),
        ("w8a8", {"features": frozenset()}, Int8Exact, "float32 products"),
        ("w4a4-o16-24", {}, SplitSparse, "cuSPARSELt"),
        ("w4a4-o16-24", {"features": ON_HOPPER}, SplitMma, "Hopper kernel above M = 64"),
        ("w8a8-24", {"features": ON_HOPPER}, SplitSparse, "cuSPARSELt"),
        ("w8a8-24", {"features": frozenset({TRITON})}, SplitMma, "int8 tensor cores"),
        ("w8a8-24", {"features": frozenset({CUSPARSELT})}, SplitInteger, "float32 products"),
        ("w4a4-o16", {"dtype": torch.float32}, SplitInteger, "float32 products"),
        ("w4a8", {"K": MAX_COLUMNS + 1}, SplitInteger, "float32 products"),
        ("w4a8-o16", {"K": MAX_COLUMNS + 16}, SplitMma, "int8 tensor cores"),
        ("w4a16-o16", {}, SplitDequantized, "unpacks"),
        ("w16a16-24", {}, SparseValues, "9.00 bits per weight"),
        ("w16a16-24", {"features": frozenset({TRITON})}, SplitDequantized, "unpacks"),
        ("w16a16-24", {"dtype": torch.float32}, SplitDequantized, "unpacks"),
        ("w4a16-24", {}, SplitDequantized, "unpacks"),
    ],
)
def test_choice(text: str, changes: dict[str, Any], expected: type, why: str) -> None:
    choice = dispatch.choose(problem(text, **changes))
    assert choice.implementation is expected
    assert why in choice.reason


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        ("w4a4", {"device": "cpu"}, "runs on a CUDA device only"),
        ("w4a16-o16", {}, "takes quantized activations"),
        ("w4a4", {"dtype": torch.float32}, "bfloat16 or float16 activations, not torch.float32"),
        ("w4a4", {"features": frozenset()}, "needs Triton"),
        ("w4a4", {"K": MAX_COLUMNS + 1}, f"up to {MAX_COLUMNS} base columns.* not {MAX_COLUMNS + 1}"),
    ],
)
def test_refusals_have_reasons(text: str, changes: dict[str, Any], reason: str) -> None:
    candidates = {c.name: c for c in dispatch.explain(problem(text, **changes))}
    assert not candidates["int8-mma"].usable
    assert re.search(reason, candidates["int8-mma"].reason)
    assert candidates["int8-sparse"].reason == "takes 2:4 weights"


def test_sparse_says_what_it_lacks() -> None:
    candidates = {c.name: c for c in dispatch.explain(problem("w4a4-24", features=frozenset({TRITON})))}
    assert "cuSPARSELt" in candidates["int8-sparse"].reason and not candidates["int8-sparse"].usable


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 48), (3, 40, 52), (5, 24, 2100)], ids=str)
@pytest.mark.parametrize("text", INTEGER)
def test_without_outliers_every_bit_is_that_of_split_exact(
    text: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    M, N, K = shape
    tensor = random_split_tensor(N, K, text, clip=0.9 if "a4" in text else 1.0, shuffled=True, dtype=dtype)
    x = activations(M, K, dtype)
    exact, choice = dispatch.prepare(tensor, tensor.scheme, dtype, features=frozenset())
    assert choice.implementation is SplitInteger
    for bias in (None, torch.randn(N).to(dtype)):
        y = on_cpu(tensor, dtype).linear(x, bias)
        assert torch.equal(y, exact.linear(x, bias))
        assert torch.equal(y, reference.linear(x, tensor, tensor.scheme, bias))


@pytest.mark.parametrize("M", [0, 1, 12])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("text", WITH_OUTLIERS)
def test_with_outliers_and_bias(text: str, M: int, dtype: torch.dtype) -> None:
    tensor = random_split_tensor(40, 96, text, shuffled=True, dtype=dtype)
    x, bias = activations(M, 96, dtype), torch.randn(40).to(dtype)
    packed = on_cpu(tensor, dtype)
    wide = reference.split_linear(x, tensor)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(packed(x).float(), wide, rtol=eps, atol=1e-4)
    torch.testing.assert_close(packed.linear(x, bias).float(), wide + bias.float(), rtol=eps, atol=1e-4)
    assert packed.linear(x, bias).dtype == dtype


@pytest.mark.parametrize("text", [*INTEGER, *WITH_OUTLIERS])
def test_weights_come_back(text: str) -> None:
    tensor = random_split_tensor(40, 96, text, shuffled=True)
    packed = on_cpu(tensor, BF16)
    assert torch.equal(packed.dequantize(), tensor.dequantize())
    index = torch.tensor([3, 0, 39, 3])
    assert torch.equal(packed.rows(index), tensor.dequantize(BF16)[index])


def test_outliers_of_another_dtype_are_rounded_once() -> None:
    tensor = random_split_tensor(40, 96, "w4a4-o16", dtype=FP16)
    packed = on_cpu(tensor, BF16)
    rounded = SplitTensor(tensor.base, tensor.outliers.to(BF16), tensor.split, tensor.scheme)
    assert torch.equal(packed.dequantize(), rounded.dequantize())


@pytest.mark.parametrize("text", ["w4a4", "w4a8-o24", "w8a8-o16", "w8a8-rot"])
@pytest.mark.parametrize("shape", [(64, 256), (40, 200)], ids=str)
def test_bits_in_memory_are_those_stated(text: str, shape: tuple[int, int]) -> None:
    N, K = shape
    tensor = random_split_tensor(N, K, text)
    packed = on_cpu(tensor, BF16)
    indices = tensor.split.base_idx.nbytes + tensor.split.outlier_idx.nbytes
    stated = SplitMma.describe(problem(text, N, K))
    assert f"{(packed.nbytes - indices) * 8 / (N * K):.2f} bits per weight" in stated


def test_a_plain_weight_has_no_outliers() -> None:
    w = Scheme.parse("w8a8").weight
    codes = torch.randint(-128, 128, (40, 200), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    qt = QuantizedTensor(codes, (torch.rand(40, 1) + 0.5).to(BF16), None, w)
    tensor = split_cuda.as_split(qt, problem("w8a8", 40, 200))
    x, scheme = activations(7, 200, BF16), Scheme.parse("w8a8")
    for bias in (None, torch.randn(40).to(BF16)):
        want = reference.linear(x, qt, scheme, bias)
        assert torch.equal(on_cpu(tensor, BF16).linear(x, bias), want)
        for features in (frozenset(), None):  # the implementations for CPUs have the same bits
            assert torch.equal(dispatch.prepare(qt, scheme, BF16, features=features)[0].linear(x, bias), want)


def test_prepared_with_the_shared_quantizer() -> None:
    pytest.importorskip("bitwright.kernels.shared_input")
    for text in ("w4a4-o16", "w8a8-o16-rot"):
        tensor = random_split_tensor(40, 96, text, shuffled=True)
        x = activations(5, 96, BF16)
        assert torch.equal(SplitMma.prepare(tensor, problem(text, 40, 96))(x), on_cpu(tensor, BF16)(x))
    plain = Scheme.parse("w8a8")
    codes = torch.randint(-128, 128, (40, 96), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    qt = QuantizedTensor(codes, (torch.rand(40, 1) + 0.5).to(BF16), None, plain.weight)
    x = activations(5, 96, BF16)
    assert torch.equal(SplitMma.prepare(qt, problem("w8a8", 40, 96))(x), reference.linear(x, qt, plain))


def test_preparing_changes_nothing_it_was_given() -> None:
    tensor = random_split_tensor(40, 96, "w8a8-o16")
    assert isinstance(tensor.base, QuantizedTensor)
    before = tensor.base.codes.clone(), tensor.outliers.clone()
    packed = on_cpu(tensor, BF16)
    packed(torch.ones(2, 96, dtype=BF16))
    assert torch.equal(tensor.base.codes, before[0]) and torch.equal(tensor.outliers, before[1])


class FakeSparse:
    """cuSPARSELt's functions over dense tensors: the numbers, the shapes that it takes, and how often it searched."""

    def __init__(self) -> None:
        self.searches, self.algorithms = 0, []

    def compress(self, dense: Tensor) -> Tensor:
        assert dense.is_contiguous() and dense.shape[0] % 32 == 0 and dense.shape[1] % 32 == 0
        assert ((dense.view(-1, 4) != 0).sum(1) <= 2).all(), "not 2:4"
        return dense

    def mm(
        self,
        compressed: Tensor,
        right: Tensor,
        *,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
        alg_id: int = 0,
    ) -> Tensor:
        assert right.shape[1] % 16 == 0 and right.stride(0) == 1 and right.dtype == compressed.dtype
        assert (out_dtype == torch.int32) == (right.dtype == torch.int8) == (not transpose_result)
        self.algorithms.append(alg_id)
        y = (compressed.double() @ right.double()).to(out_dtype or right.dtype)
        return y.t().contiguous() if transpose_result else y

    def search(
        self, compressed: Tensor, right: Tensor, *, out_dtype: torch.dtype | None, transpose_result: bool
    ) -> int:
        assert transpose_result == (right.dtype != torch.int8)
        self.searches += 1
        return self.searches


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> FakeSparse:
    fake = FakeSparse()
    monkeypatch.setattr(torch, "_cslt_compress", fake.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", fake.mm)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", fake.search)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(split_sparse, "_algorithms", {})
    return fake


@pytest.mark.parametrize("text", ["w4a4-24", "w8a8-24", "w4a4-o24-24"])
@pytest.mark.parametrize("M", [0, 1, 33, 70])
def test_sparse(sparse: FakeSparse, text: str, M: int) -> None:
    """Everything around cuSPARSELt."""
    tensor = random_split_tensor(40, 216, text, shuffled=True)
    packed = SplitSparse(problem(text, 40, 216), tensor, PlainInput(tensor.split))
    dense = on_cpu(tensor, BF16)
    x, bias = activations(M, 216, BF16), torch.randn(40).to(BF16)
    assert torch.equal(packed.linear(x, bias), dense.linear(x, bias))
    assert torch.equal(packed(x), dense(x))
    assert torch.equal(packed.dequantize(), tensor.dequantize())
    index = torch.tensor([39, 2])
    assert torch.equal(packed.rows(index), tensor.dequantize(BF16)[index])


@pytest.mark.parametrize("text", ["w8a8-24", "w4a4-o24-24"])
@pytest.mark.parametrize(("M", "products"), [(0, 0), (1, 1), (96, 1), (97, 2), (300, 4)])
def test_sparse_in_pieces(sparse: FakeSparse, text: str, M: int, products: int) -> None:
    N = 300
    tensor = random_split_tensor(N, 216, text, shuffled=True)
    cut = SplitSparse(problem(text, N, 216), tensor, PlainInput(tensor.split), most_sums=N * 100)
    whole = SplitSparse(problem(text, N, 216), tensor, PlainInput(tensor.split))
    x, bias = activations(M, 216, BF16), torch.randn(N).to(BF16)
    y = cut.linear(x, bias)
    assert len(sparse.algorithms) == products
    torch.testing.assert_close(y, whole.linear(x, bias), rtol=0 if "o" not in text else 2**-8, atol=0)


def test_sparse_searches_once_a_size_and_never_in_a_capture(
    sparse: FakeSparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = random_split_tensor(40, 216, "w8a8-24")
    packed = SplitSparse(problem("w8a8-24", 40, 216), tensor, PlainInput(tensor.split))
    for M in (1, 20, 32, 33, 64, 20):
        packed(activations(M, 216, BF16))
    assert sparse.searches == 2 and sparse.algorithms == [1, 1, 1, 2, 2, 1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    packed(activations(65, 216, BF16))
    packed(activations(64, 216, BF16))
    assert sparse.searches == 2 and sparse.algorithms[-2:] == [0, 2]


def test_matrices_of_one_shape_search_once(sparse: FakeSparse) -> None:
    for text, N, searches in (("w8a8-24", 40, 1), ("w4a4-24", 40, 1), ("w8a8-24", 48, 2)):
        tensor = random_split_tensor(N, 216, text, seed=searches)
        SplitSparse(problem(text, N, 216), tensor, PlainInput(tensor.split))(activations(20, 216, BF16))
        assert sparse.searches == searches


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("M", [0, 1, 33])
def test_sparse_values(sparse: FakeSparse, M: int, shuffled: bool) -> None:
    tensor = random_split_tensor(40, 216, "w16a16-24", shuffled=shuffled)
    packed = SparseValues(problem("w16a16-24", 40, 216), tensor)
    x, bias = activations(M, 216, BF16), torch.randn(40).to(BF16)
    wide = x.double() @ tensor.dequantize(torch.float64).t()
    assert torch.equal(packed(x), wide.to(BF16))
    assert torch.equal(packed.linear(x, bias), wide.to(BF16) + bias)
    assert torch.equal(packed.dequantize(), tensor.dequantize())
    index = torch.tensor([39, 2])
    assert torch.equal(packed.rows(index), tensor.dequantize(BF16)[index])


@pytest.mark.parametrize("K", [32, 100, 128, 300])
@pytest.mark.parametrize("dtype", [torch.int8, BF16], ids=str)
def test_what_was_compressed_comes_back(sparse: FakeSparse, dtype: torch.dtype, K: int) -> None:
    kept = torch.arange(K) % 4 < 2
    dense = (torch.randint(-128, 128, (5, K)) * kept).to(dtype)
    assert torch.equal(Compressed(dense).dense(), dense)
