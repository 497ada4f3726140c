"""Every implementation against a dequantization written out here, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels import cpu, dispatch, reference
from bitwright.kernels.dequantize import DequantizedWeight, Int8Exact
from bitwright.kernels.problem import AVX512, NATIVE_BF16, VNNI, Problem, cpu_features
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

SCHEMES = (
    "w4a16-g64", "w4a16", "w4a16-g64-asym", "w4a16-g48", "w3a16-g64", "w3a16-asym", "w2a16-g32-asym", "w8a16",
    "w8a16-g64", "w8a16-g64-asym", "w3a16-g40-asym",
)  # fmt: skip
SHAPES = ((192, 128), (100, 200), (48, 33))  # regular; rows and a group that are ragged; nothing fits
MACHINES = (None, frozenset(), frozenset({AVX512}))
needs_int4 = pytest.mark.skipif(cpu.int4_block() is None, reason="packs 4-bit weights in an unknown order")
BOUND = {torch.bfloat16: 3.5e-3, torch.float16: 6e-4, torch.float32: 1e-6}  # one or two roundings


def random_weight(scheme: Scheme, N: int, K: int, scale_dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """Random codes over the whole range; scales of both signs."""
    w = scheme.weight
    generator = torch.Generator().manual_seed(N * K)
    grid = (N, w.num_groups(K))
    codes = torch.randint(w.qmin, w.qmax + 1, (N, K), generator=generator).to(torch.int8)
    zero = None if w.symmetric else torch.randint(w.qmin, w.qmax + 1, grid, generator=generator).to(torch.int8)
    return QuantizedTensor(codes, (torch.randn(grid, generator=generator) * 0.02).to(scale_dtype), zero, w)


def dequantized(qt: QuantizedTensor) -> Tensor:
    """float64 [N, K], element by element from the formula in the docstring of QuantizedTensor."""
    K = qt.codes.shape[1]
    group = torch.arange(K) // (qt.scheme.group_size or K)
    codes = qt.codes.double() - (0 if qt.zero_point is None else qt.zero_point.double()[:, group])
    return codes * qt.scale.double()[:, group]


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def activations(M: int, K: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product(text: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scheme = Scheme.parse(text)
    qt = random_weight(scheme, *shape)
    weight = dequantized(qt)
    for features in MACHINES:
        packed, choice = dispatch.prepare(qt, scheme, dtype, features=features)
        for M in (0, 1, 3, 160):  # the last lies beyond every threshold
            x = activations(M, shape[1], dtype)
            y = packed(x)
            assert (y.dtype, tuple(y.shape)) == (dtype, (M, shape[0]))
            if M:
                assert relative(y, x.double() @ weight.t()) < BOUND[dtype], (choice.name, M)


@pytest.mark.parametrize("text", (*SCHEMES, "w8a8"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_weight_is_exact(text: str, shape: tuple[int, int]) -> None:
    """Rows, the whole matrix and one column at a time are the formula's numbers, rounded once."""
    scheme = Scheme.parse(text)
    qt = random_weight(scheme, *shape)
    weight = dequantized(qt)
    index = torch.tensor([shape[0] - 1, 0, 5, 5])
    for dtype in (torch.bfloat16, torch.float32):
        packed, _ = dispatch.prepare(qt, scheme, dtype)
        for rounded in (torch.float32, torch.bfloat16):
            assert torch.equal(packed.dequantize(rounded), weight.to(rounded))
        assert torch.equal(packed.rows(index), weight[index].to(dtype))


@pytest.mark.parametrize("text", [s for s in SCHEMES if "asym" not in s or s.startswith("w8")])
@pytest.mark.parametrize("above", [True, False], ids=["gemm", "operator"])
def test_one_hot_activations_read_the_weight_back(text: str, above: bool) -> None:
    """bf16 of every weight to the last bit, on both sides of the threshold. (With 4-bit zero points the small-M path
    adds its correction to a rounded product, so there only the bound of `test_product` holds.)"""
    scheme = Scheme.parse(text)
    qt = random_weight(scheme, 64, 160)
    packed, _ = dispatch.prepare(qt, scheme, torch.bfloat16)
    one_hot = torch.eye(160, dtype=torch.bfloat16)
    pieces = [one_hot] if above else one_hot.split(20)
    assert torch.equal(torch.cat([packed(p) for p in pieces]), dequantized(qt).t().to(torch.bfloat16))


@needs_int4
def test_zero_points_are_corrected() -> None:
    """Every code on its zero point is a weight of zeros; offsets rounded to bf16 alone would add up to something."""
    scheme = Scheme.parse("w4a16-g64-asym")
    qt = random_weight(scheme, 64, 1024)
    zeros = replace(qt, codes=qt.zero_point.repeat_interleave(64, dim=1))
    packed, choice = dispatch.prepare(zeros, scheme, torch.bfloat16)
    assert choice.name == "int4pack"
    x = torch.ones(1, 1024, dtype=torch.bfloat16)
    corrected = float(packed(x).norm())
    packed._rest, packed._plain = None, True
    assert corrected < 0.01 * float(packed(x).norm())


@pytest.mark.parametrize("features", [frozenset(), frozenset({AVX512, VNNI})], ids=["exact", "vnni"])
@pytest.mark.parametrize("shape", [(40, 96), (17, 33), (8, 2500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_int8_activations_are_bit_exact(features: frozenset[str], shape: tuple[int, int], dtype: torch.dtype) -> None:
    if not features <= cpu_features():
        pytest.skip("needs int8 dot products; without them this operator's sums saturate")
    scheme = Scheme.parse("w8a8")
    qt = random_weight(scheme, *shape)
    packed, _ = dispatch.prepare(qt, scheme, dtype, features=features)
    for M in (0, 1, 5, 130):
        x = activations(M, shape[1], dtype)
        x[M // 2 :] *= 50
        scale = x.float().abs().amax(dim=1, keepdim=True) / 127
        codes = torch.round(x.float() / scale).long()  # round half to even
        expected = (codes @ qt.codes.long().t()).float() * scale * qt.scale.float().t()
        assert torch.equal(packed(x), expected.to(dtype))
        assert torch.equal(reference.linear(x, qt, scheme), expected.to(dtype))


def test_int8_activations_at_the_edges() -> None:
    codes, scale = reference.quantize_activations(torch.tensor([[0.0, 0.0], [127.0, -0.5], [-127.0, 1.5]]))
    assert codes.tolist() == [[0, 0], [127, 0], [-127, 2]]
    assert scale.flatten().tolist() == [1.0, 1.0, 1.0]
    scheme = Scheme.parse("w8a8")
    qt = random_weight(scheme, 8, 32)
    x = activations(2, 32, torch.float32)
    x[1, 3] = float("inf")
    y = dispatch.prepare(qt, scheme, torch.float32)[0](x)
    assert bool(y[0].isfinite().all()) and not bool(y[1].isfinite().any())


@pytest.mark.parametrize("text", ["w4a16-g64", "w4a16-g64-asym", "w8a16"])
def test_reference_is_the_formula(text: str) -> None:
    scheme = Scheme.parse(text)
    qt = random_weight(scheme, 24, 128)
    bias = torch.randn(24)
    x = activations(6, 128, torch.float32).view(2, 3, 128)
    expected = x.double() @ dequantized(qt).t() + bias.double()
    assert torch.equal(reference.linear(x, qt, scheme, bias), expected.float())


@needs_int4
def test_codes_keep_their_width_in_memory() -> None:
    """Bytes as `explain` states them: 4.5 bits at g64, 3-bit codes 3 bits where no operator widens them."""
    for text, dtype, bits in (("w4a16-g64", torch.bfloat16, 4.5), ("w3a16-g64", torch.float32, 3.25)):
        scheme = Scheme.parse(text)
        packed, choice = dispatch.prepare(random_weight(scheme, 256, 512), scheme, dtype)
        assert packed.nbytes * 8 / (256 * 512) == bits
        assert f"{bits:.2f} bits per weight" in choice.reason


def test_preparing_changes_nothing_it_was_given() -> None:
    for text in SCHEMES:
        scheme = Scheme.parse(text)
        qt = random_weight(scheme, 100, 200)
        before = [t.clone() for t in (qt.codes, qt.scale)]
        packed, _ = dispatch.prepare(qt, scheme, torch.bfloat16)
        x = activations(3, 200, torch.bfloat16)
        kept = x.clone()
        packed(x)
        assert torch.equal(qt.codes, before[0]) and torch.equal(qt.scale, before[1]) and torch.equal(x, kept)


def problem(text: str, features: frozenset[str], **changes) -> Problem:
    given = {"dtype": torch.bfloat16, "scale_dtype": torch.bfloat16, "N": 64, "K": 576, "device": "cpu"} | changes
    return Problem(scheme=Scheme.parse(text), features=features, **given)


@pytest.mark.parametrize(
    ("text", "changes", "expected", "why"),
    [
        ("w4a16-g64", {}, cpu.Int4Weight, "groups of 64"),
        ("w4a16-g192", {}, cpu.Int4Weight, "groups of 64"),
        ("w4a16", {"K": 1024}, cpu.Int4Weight, "groups of 256"),
        ("w3a16-g64", {}, cpu.Int4Weight, "3-bit codes take 4"),
        ("w8a16", {}, cpu.Int8Weight, "8-bit operator"),
        ("w8a16", {"K": 100}, cpu.Int4Weight, "4-bit operator"),
        ("w8a16-g64", {}, cpu.Int4Weight, "9.00 bits"),
        ("w4a16-g48", {}, DequantizedWeight, "multiplies in bfloat16"),
        ("w4a16-g64", {"dtype": torch.float32}, DequantizedWeight, "multiplies in float32"),
        ("w4a16-g64", {"dtype": torch.float16}, DequantizedWeight, "multiplies in float32"),
        ("w4a16-g64", {"scale_dtype": torch.float16}, DequantizedWeight, "rows per call"),
        ("w4a16-g64", {"device": "cuda"}, DequantizedWeight, "multiplies in bfloat16"),
        ("w8a8", {}, cpu.Int8Dynamic, "int32 sums"),
        ("w8a8", {"device": "cuda"}, Int8Exact, "float32 products"),
    ],
)
def test_choice(monkeypatch: pytest.MonkeyPatch, text: str, changes: dict, expected: type, why: str) -> None:
    monkeypatch.setattr(cpu, "int4_block", lambda: 64)
    choice = dispatch.choose(problem(text, frozenset({AVX512, NATIVE_BF16, VNNI}), **changes))
    assert choice.implementation is expected
    assert why in choice.reason


def test_older_machines_choose_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "int4_block", lambda: 32)
    assert dispatch.choose(problem("w8a8", frozenset())).implementation is Int8Exact
    assert "to M = 128" in dispatch.choose(problem("w4a16-g64", frozenset())).reason
    assert "at any M" in dispatch.choose(problem("w4a16-g64", frozenset({AVX512}))).reason
    assert "multiplies in float32" in dispatch.choose(problem("w4a16-g48", frozenset({AVX512}))).reason


def test_explain_names_every_candidate() -> None:
    candidates = dispatch.explain(problem("w4a16-g48", cpu_features()))
    assert [c.implementation for c in candidates] == list(dispatch.IMPLEMENTATIONS)
    assert [c.name for c in candidates if c.usable] == ["dequantize"]
    refused = next(c for c in candidates if c.name == "int4pack")
    assert refused.reason == "group size 48 is no multiple of 32"


def test_unknown_int4_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "int4_block", lambda: None)
    choice = dispatch.choose(problem("w4a16-g64", frozenset()))
    assert choice.implementation is DequantizedWeight


def test_scheme_and_weight_must_agree() -> None:
    qt = random_weight(Scheme.parse("w4a16-g64"), 64, 128)
    with pytest.raises(SchemeError, match="w4a16-g32"):
        dispatch.prepare(qt, Scheme.parse("w4a16-g32"), torch.bfloat16)
