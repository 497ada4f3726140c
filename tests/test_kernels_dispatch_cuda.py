"""What would be chosen on a GPU, explained and run without one: features are given, operators have CPU programs."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.kernels import cuda, dispatch, problem
from bitwright.kernels.cuda import FragmentWeight, GluonWeight, HopperWeight, TritonWeight, gemm_above
from bitwright.kernels.dequantize import DequantizedWeight, Int8Exact
from bitwright.kernels.permuted import Permuted
from bitwright.kernels.problem import (
    CUSPARSELT,
    GLUON,
    HOPPER,
    NVRTC,
    NVRTC_MISSING,
    PDL,
    TRITON,
    Problem,
    cuda_features,
    triton_version,
)
from bitwright.kernels.split_cuda import SplitMma
from bitwright.nn.linear import QuantLinear
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

ALL = frozenset({HOPPER, TRITON, GLUON, PDL})
COMPILER = ALL | {NVRTC}
SCHEMES = ("w4a16-g64", "w3a16-g32-asym", "w2a16-g128-asym", "w8a16", "w4a16")


def given(text: str, features: frozenset[str] = ALL, **changes: object) -> Problem:
    rest = {"dtype": torch.bfloat16, "scale_dtype": torch.bfloat16, "N": 64, "K": 576, "device": "cuda"} | changes
    return Problem(scheme=Scheme.parse(text), features=features, **rest)


def random_weight(text: str, N: int, K: int, scale_dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    w = Scheme.parse(text).weight
    generator = torch.Generator().manual_seed(N * K)
    grid = (N, w.num_groups(K))
    codes = torch.randint(w.qmin, w.qmax + 1, (N, K), generator=generator).to(torch.int8)
    zero = torch.randint(w.qmin, w.qmax + 1, grid, generator=generator).to(torch.int8)
    scale = (torch.randn(grid, generator=generator) * 0.02).to(scale_dtype)
    return QuantizedTensor(codes, scale, None if w.symmetric else zero, w)


def on_cpu(
    kind: type[FragmentWeight], text: str, qt: QuantizedTensor, dtype: torch.dtype = torch.bfloat16
) -> FragmentWeight:
    """`kind` over tensors that lie on the CPU, as it would be prepared for a GPU."""
    N, K = qt.shape
    return kind.prepare(qt, given(text, N=N, K=K, dtype=dtype, scale_dtype=qt.scale.dtype))


@pytest.mark.parametrize(
    ("text", "features", "changes", "expected", "why"),
    [
        ("w4a16-g64", COMPILER, {}, HopperWeight, "Hopper kernels with the weight in registers at any M; 4.25 bits"),
        ("w3a16-g32-asym", COMPILER, {}, HopperWeight, "Hopper kernels"),
        ("w4a16-g192", COMPILER, {}, HopperWeight, "Hopper kernels"),  # by the Gluon one, for any M
        ("w4a16-g64", COMPILER - {GLUON}, {}, TritonWeight, "Triton kernel"),  # many tokens need it
        ("w4a16-g64", COMPILER - {HOPPER}, {}, TritonWeight, "Triton kernel"),
        ("w4a16-g96", COMPILER, {}, TritonWeight, "Triton kernel"),
        ("w4a16-g64", ALL, {}, GluonWeight, "Hopper kernel"),
        ("w4a16-g32", ALL, {}, GluonWeight, "Hopper kernel"),
        ("w4a16-g192", ALL, {}, GluonWeight, "Hopper kernel"),
        ("w3a16-asym", ALL, {}, GluonWeight, "Hopper kernel"),
        ("w2a16-g128-asym", ALL, {"K": 100}, GluonWeight, "Hopper kernel"),  # one group after all
        ("w8a16", ALL, {"dtype": torch.float16, "scale_dtype": torch.float16}, GluonWeight, "at any M"),
        ("w4a16-g64", ALL - {GLUON}, {}, TritonWeight, "Triton kernel"),
        ("w4a16-g64", ALL - {HOPPER}, {}, TritonWeight, "to M = 128, dequantize + cuBLAS above"),
        ("w4a16-g96", ALL, {}, TritonWeight, "Triton kernel"),
        ("w4a16-g64", ALL, {"scale_dtype": torch.float16}, TritonWeight, "Triton kernel"),
        ("w4a16-g64", frozenset(), {}, DequantizedWeight, "multiplies in bfloat16"),
        ("w4a16-g64", ALL, {"dtype": torch.float32}, DequantizedWeight, "multiplies in float32"),
        ("w4a16-g48", ALL, {}, DequantizedWeight, "multiplies in bfloat16"),
        ("w8a8", ALL, {}, SplitMma, "int8 tensor cores"),
        ("w8a8", ALL, {"dtype": torch.float32}, Int8Exact, "float32 products"),
    ],
)
def test_choice(text: str, features: frozenset[str], changes: dict, expected: type, why: str) -> None:
    choice = dispatch.choose(given(text, features, **changes))
    assert choice.implementation is expected
    assert why in choice.reason


@pytest.mark.parametrize(
    ("text", "features", "changes", "gluon", "triton"),
    [
        ("w4a16-g64", ALL - {HOPPER}, {}, "Hopper GPU", None),
        ("w4a16-g64", ALL - {GLUON}, {}, "Gluon it is written for, of Triton 3.6", None),
        ("w4a16-g64", frozenset(), {}, "needs Triton", "needs Triton"),
        ("w4a16-g96", ALL, {}, "not of 96", None),
        ("w4a16-g48", ALL, {}, "not of 48", "not of 48"),
        ("w4a16-g64", ALL, {"scale_dtype": torch.float16}, "not torch.float16", None),
        ("w4a16-g64", ALL, {"dtype": torch.float32}, "not torch.float32", "not torch.float32"),
        ("w4a16-g64", ALL, {"device": "cpu"}, "CUDA device only", "CUDA device only"),
        ("w8a8", ALL, {}, "16-bit activations", "16-bit activations"),
    ],
)
def test_refusals_have_reasons(text: str, features: frozenset[str], changes: dict, gluon: str, triton: str) -> None:
    for more in (frozenset(), {NVRTC}):
        candidates = {c.name: c for c in dispatch.explain(given(text, features | more, **changes))}
        # A compiler alone does not make a Hopper kernel: what the Gluon one refuses, both do.
        for name, reason in (("hopper", gluon), ("gluon", gluon), ("triton", triton)):
            assert candidates[name].usable == (reason is None)
            assert reason is None or reason in candidates[name].reason


def test_a_missing_compiler_is_the_only_reason_for_the_gluon_kernel_alone() -> None:
    with_it, without = ({c.name: c for c in dispatch.explain(given("w4a16-g64", f))} for f in (COMPILER, ALL))
    assert list(with_it)[list(with_it).index("hopper") + 1] == "gluon", "its deputy comes next"
    assert with_it["hopper"].usable and with_it["gluon"].usable
    assert (without["hopper"].usable, without["hopper"].reason) == (False, NVRTC_MISSING)
    assert without["gluon"] == with_it["gluon"] and without["triton"] == with_it["triton"]


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 256), (40, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_is_exact(text: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    qt = random_weight(text, *shape)
    packed = on_cpu(TritonWeight, text, qt, dtype)
    index = torch.tensor([shape[0] - 1, 0, 9, 9])
    assert torch.equal(packed.dequantize(), qt.dequantize())
    assert torch.equal(packed.dequantize(torch.bfloat16), qt.dequantize(torch.bfloat16))
    assert torch.equal(packed.rows(index), qt.dequantize(dtype)[index])
    for M in (0, 1, 3):
        x = torch.randn(M, shape[1]).to(dtype)
        y = packed(x)
        assert (y.dtype, tuple(y.shape)) == (dtype, (M, shape[0]))
        expected = (x.double() @ qt.dequantize(dtype).double().t()).to(dtype)
        torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 256), (40, 200)], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bits_in_memory_are_those_stated(text: str, shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    N, K = shape
    packed = on_cpu(TritonWeight, text, random_weight(text, N, K, scale_dtype))
    stated = TritonWeight.describe(given(text, N=N, K=K, scale_dtype=scale_dtype))
    assert f"{packed.nbytes * 8 / (N * K):.2f} bits per weight" in stated


def test_many_tokens_take_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    operator = cuda.fragment_linear
    monkeypatch.setattr(cuda, "fragment_linear", lambda *a: asked.append(a[-1]) or operator(*a))
    packed = on_cpu(TritonWeight, "w4a16-g64", random_weight("w4a16-g64", 16, 64))
    assert packed.gemm_above == 128 == gemm_above(given("w4a16-g64"), TritonWeight.NAME)
    for M in (128, 129):
        packed(torch.zeros(M, 64, dtype=torch.bfloat16))
    assert asked == ["triton", "dequantize"]
    for kind in (GluonWeight, HopperWeight):
        asked.clear()
        packed = on_cpu(kind, "w4a16-g64", random_weight("w4a16-g64", 16, 64))
        assert packed.gemm_above is None
        for M in (1, 5000):
            packed(torch.zeros(M, 64, dtype=torch.bfloat16))
        assert asked == [kind.NAME] * 2, "which of the Hopper kernels runs is not for this file to choose"


@pytest.mark.parametrize("compiled", [False, True])
def test_linear_is_one_operator_call_with_its_bias(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    text = "w4a16-g64"
    qt, bias = random_weight(text, 64, 128), torch.randn(64).bfloat16()
    choice = dispatch.choose(given(text, N=64, K=128))
    layer = QuantLinear(on_cpu(GluonWeight, text, qt), Scheme.parse(text), choice, bias)
    x = torch.randn(2, 3, 128)
    exact = x.bfloat16().double() @ qt.dequantize(torch.bfloat16).double().t() + bias.double()
    biases: list[Tensor] = []
    if compiled:
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    else:
        operator = cuda.fragment_linear
        monkeypatch.setattr(cuda, "fragment_linear", lambda *a: biases.append(a[4]) or operator(*a))
    torch.testing.assert_close(layer(x).double(), exact, rtol=8e-3, atol=1e-5)
    assert layer(x[:0]).shape == (0, 3, 64)
    if not compiled:
        assert all(b is layer.bias for b in biases) and len(biases) == 2
        layer.float()  # the bias follows the model; the operator wants the weight's dtype
        torch.testing.assert_close(layer(x).double(), exact, rtol=8e-3, atol=1e-5)
        assert biases[-1].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [HopperWeight, GluonWeight, TritonWeight])
def test_preparing_changes_nothing_it_was_given(kind: type[FragmentWeight]) -> None:
    qt = random_weight("w4a16-g64", 40, 200)
    before = qt.codes.clone(), qt.scale.clone()
    on_cpu(kind, "w4a16-g64", qt)(torch.ones(2, 200, dtype=torch.bfloat16))
    assert torch.equal(qt.codes, before[0]) and torch.equal(qt.scale, before[1])


def test_a_permuted_weight_runs_over_fragments() -> None:
    qt = random_weight("w4a16-g64", 40, 192)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    permuted = replace(qt, order=order)
    packed = Permuted(on_cpu(TritonWeight, "w4a16-g64", qt), order)
    assert torch.equal(packed.dequantize(), permuted.dequantize())
    assert not torch.equal(packed.dequantize(), qt.dequantize())
    index = torch.tensor([3, 39])
    assert torch.equal(packed.rows(index), permuted.dequantize(torch.bfloat16)[index])
    one_hot = torch.eye(192, dtype=torch.bfloat16)
    assert torch.equal(packed(one_hot), permuted.dequantize(torch.bfloat16).t())


# --- what the machine offers


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """device(capability, triton) makes torch report one such GPU."""

    def device(capability: tuple[int, int], triton: str | None, cuda_version: str | None = "13.0") -> None:
        def version(name: str) -> str:
            if name != "triton" or triton is None:
                raise PackageNotFoundError(name)
            return triton

        monkeypatch.setattr(problem, "version", version)
        monkeypatch.setattr(problem, "find_spec", lambda name: None if triton is None else object())
        monkeypatch.setattr(torch.version, "cuda", cuda_version)
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
        monkeypatch.setattr(problem.nvrtc, "missing", lambda: "not there")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        problem._cuda_features.cache_clear()

    yield device
    problem._cuda_features.cache_clear()


@pytest.mark.parametrize(
    ("capability", "triton", "expected"),
    [
        ((9, 0), "3.6.0", ALL),
        ((9, 0), "3.9.1+git", ALL - {GLUON}),
        ((9, 0), "3.4.0", frozenset({HOPPER, TRITON})),
        ((9, 0), "unreadable", frozenset({HOPPER, TRITON})),
        ((8, 0), "3.6.0", frozenset({TRITON, GLUON})),
        ((10, 0), "3.6.0", frozenset({TRITON, GLUON, PDL})),  # Blackwell has no wgmma
        ((7, 5), "3.6.0", frozenset()),
        ((9, 0), None, frozenset()),
    ],
)
def test_features(gpu, capability: tuple[int, int], triton: str | None, expected: frozenset[str]) -> None:
    gpu(capability, triton)
    assert cuda_features("cuda") == cuda_features(torch.device("cuda", 0)) == expected
    of = Problem.of(random_weight("w4a16-g64", 16, 64), Scheme.parse("w4a16-g64"), torch.bfloat16, "cuda:0")
    assert (of.features, of.device) == (expected, "cuda")


def test_cusparselt_is_a_feature(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0), "3.6.0")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert cuda_features() == ALL | {CUSPARSELT}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_the_runtime_compiler_is_a_feature_of_hopper(
    gpu, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    gpu(capability, "3.6.0")
    monkeypatch.setattr(problem.nvrtc, "missing", lambda: None)
    assert (NVRTC in cuda_features()) == (capability == (9, 0))


def test_rocm_is_not_cuda(gpu) -> None:
    gpu((9, 0), "3.6.0", cuda_version=None)
    assert cuda_features() == frozenset()


def test_a_device_that_is_not_there_is_named(gpu) -> None:
    gpu((9, 0), "3.6.0")
    with pytest.raises(BitwrightError, match="device 'cuda:3' was asked for, but torch sees 1"):
        cuda_features("cuda:3")


def test_triton_version_is_the_installed_one() -> None:
    triton = pytest.importorskip("triton")
    assert triton_version() == tuple(map(int, triton.__version__.split(".")[:2]))
