"""Packed split weights: bit for bit the reference, on every path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from split_cases import random_split_tensor

from bitwright.activations import quantize_asymmetric, quantize_symmetric, rotate
from bitwright.errors import SchemeError
from bitwright.kernels import dispatch, reference
from bitwright.kernels.problem import VNNI, cpu_features
from bitwright.nn.linear import QuantLinear
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

INTEGER = ["w4a4", "w4a8", "w4a4-24", "w8a8-24", "w4a4-rot", "w8a8-rot"]
WITH_OUTLIERS = ["w4a4-o16", "w4a8-o8", "w8a8-o16", "w4a4-o16-24", "w4a4-o16-rot", "w8a8-o16-rot"]
SIXTEEN = ["w4a16-o16", "w4a16-g32-o16", "w3a16-g24-24", "w16a16-24", "w2a16-o16-24"]
SHAPES = [(1, 8, 48), (3, 40, 52), (17, 33, 96), (5, 24, 2100)]
FEATURES = [frozenset(), cpu_features() & {VNNI}]


def activations(M: int, K: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(M, K, generator=g) * torch.exp(torch.randn(M, 1, generator=g))


@pytest.mark.parametrize("features", FEATURES, ids=["plain", "this machine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", INTEGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_outliers_every_bit_is_the_reference(
    text: str, shape: tuple[int, int, int], features: frozenset[str], dtype: torch.dtype
) -> None:
    M, N, K = shape
    tensor = random_split_tensor(N, K, text, clip=0.85 if "a4" in text else 1.0, shuffled=True)
    packed, choice = dispatch.prepare(tensor, tensor.scheme, dtype, features=features)
    assert choice.name == ("split-vnni" if features else "split-exact")
    x = activations(M, K).to(dtype)
    assert torch.equal(packed(x), reference.linear(x, tensor, tensor.scheme))


@pytest.mark.parametrize("features", FEATURES, ids=["plain", "this machine"])
@pytest.mark.parametrize("text", WITH_OUTLIERS)
def test_outliers_whose_sums_are_exact_change_no_bit(text: str, features: frozenset[str]) -> None:
    """Outlier activations and weights that are small integers: their sum has one value in any order."""
    tensor = random_split_tensor(40, 96, text)
    outliers = torch.randint(-8, 9, tensor.outliers.shape, generator=torch.Generator().manual_seed(3))
    tensor = type(tensor)(tensor.base, outliers.to(torch.bfloat16), tensor.split, tensor.scheme)
    x = activations(9, 96)
    x[:, tensor.split.outlier_idx] = (x[:, tensor.split.outlier_idx] * 100).round()
    packed, _ = dispatch.prepare(tensor, tensor.scheme, torch.float32, features=features)
    assert torch.equal(packed(x), reference.linear(x, tensor, tensor.scheme))


@pytest.mark.parametrize("text", [*WITH_OUTLIERS, *SIXTEEN])
@pytest.mark.parametrize("M", [0, 1, 12])
def test_close_to_the_reference(text: str, M: int) -> None:
    tensor = random_split_tensor(40, 96, text, shuffled=True)
    x = activations(M, 96)
    packed, _ = dispatch.prepare(tensor, tensor.scheme, torch.float32)
    torch.testing.assert_close(packed(x), reference.linear(x, tensor, tensor.scheme), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["w4a4", "w4a4-o16", "w8a8-o16"])
def test_the_reference_is_the_formula(text: str) -> None:
    """Number by number, in the order that the docstring states."""
    tensor = random_split_tensor(6, 32, text, clip=0.9 if "a4" in text else 1.0)
    x = activations(4, 32)
    base, out = x[:, tensor.split.base_idx], x[:, tensor.split.outlier_idx]
    if "a4" in text:
        codes, scale, zero = quantize_asymmetric(base, tensor.split.clip)
    else:
        codes, scale = quantize_symmetric(base)
        zero = torch.zeros_like(scale, dtype=torch.int8)
    got = reference.split_linear(x, tensor)
    for m in range(4):
        for n in range(6):
            w = tensor.base.codes[n].tolist()
            acc = sum((c - zero[m].item()) * v for c, v in zip(codes[m].tolist(), w, strict=True))
            y = torch.tensor(float(acc)) * scale[m, 0] * tensor.base.scale[n, 0].float()
            if "-o" in text:
                y = y + (out[m] @ tensor.outliers[n].float())
            torch.testing.assert_close(got[m, n], y, rtol=1e-6 if "-o" in text else 0, atol=1e-6 if "-o" in text else 0)


@pytest.mark.parametrize("text", [*INTEGER, *WITH_OUTLIERS, *SIXTEEN])
def test_weights_come_back(text: str) -> None:
    tensor = random_split_tensor(40, 96, text, shuffled=True)
    packed, _ = dispatch.prepare(tensor, tensor.scheme, torch.float32)
    assert torch.equal(packed.dequantize(), tensor.dequantize())
    index = torch.tensor([3, 0, 39])
    assert torch.equal(packed.rows(index), tensor.dequantize()[index])


def test_four_bits_take_four_bits() -> None:
    tensor = random_split_tensor(64, 1088, "w4a4-o64")
    packed, _ = dispatch.prepare(tensor, tensor.scheme, torch.bfloat16)
    codes = 64 * 1024 // 2
    assert codes <= packed.nbytes < codes + 64 * 64 * 4 + 64 * 8 + 1088 * 8 + 1


def test_a_linear_with_bias_in_sixteen_bits() -> None:
    tensor = random_split_tensor(40, 96, "w4a4-o16")
    bias = torch.randn(40, generator=torch.Generator().manual_seed(4))
    layer = QuantLinear.from_quantized(tensor, tensor.scheme, bias)
    x = activations(6, 96).bfloat16().view(2, 3, 96)
    want = reference.linear(x, tensor, tensor.scheme, bias)
    assert layer(x).shape == (2, 3, 40)
    torch.testing.assert_close(layer(x), want, rtol=0.01, atol=0.01)


def test_a_weight_of_another_scheme_is_refused() -> None:
    tensor = random_split_tensor(8, 48, "w4a4-o16")
    with pytest.raises(SchemeError, match="w4a4-o16, the scheme says w4a4"):
        dispatch.prepare(tensor, Scheme.parse("w4a4"), torch.float32)


def test_a_weight_of_another_kind_is_refused() -> None:
    """Also where the grids are equal: a grid alone does not say how the input is split, and a split says too much."""
    split = random_split_tensor(8, 48, "w4a4-o16")
    grid = random_split_tensor(8, 48, "w4a4").base
    assert isinstance(grid, QuantizedTensor)
    for text in ("w4a8", "w4a4", "w4a4-o16"):
        with pytest.raises(SchemeError, match=f"a weight at {text} is a SplitTensor, not a QuantizedTensor at"):
            dispatch.prepare(grid, Scheme.parse(text), torch.float32)
    with pytest.raises(SchemeError, match="a weight at w4a16 is a QuantizedTensor, not a SplitTensor at w4a4-o16"):
        dispatch.prepare(split, Scheme.parse("w4a16"), torch.float32)


def sums_beyond_float32(text: str, K: int = 49152) -> tuple[SplitTensor, torch.Tensor]:
    """One row and one token whose sum of products passes 2^24 many times over and is no multiple of a power of two, so
    that a float32 sum over too many columns cannot hold it."""
    tensor = random_split_tensor(1, K, text)
    assert isinstance(tensor.base, QuantizedTensor)
    lowest = tensor.scheme.weight.qmin
    codes = torch.full((1, K), lowest, dtype=torch.int8)
    codes[:, ::7] = lowest + 1
    x = torch.ones(1, K)
    x[:, ::11] = 0.99
    if tensor.split.block:  # two rotations are the block's size times the identity
        x = rotate(x, tensor.split.block) / tensor.split.block
    return replace(tensor, base=replace(tensor.base, codes=codes)), x


@pytest.mark.parametrize("features", FEATURES, ids=["plain", "this machine"])
@pytest.mark.parametrize("text", ["w4a8", "w8a8-rot"])
def test_long_sums_stay_exact(text: str, features: frozenset[str]) -> None:
    tensor, x = sums_beyond_float32(text)
    packed, _ = dispatch.prepare(tensor, tensor.scheme, torch.float32, features=features)
    assert torch.equal(packed(x), reference.linear(x, tensor, tensor.scheme))


@pytest.mark.parametrize("text", ["w4a8", "w8a8-rot"])
def test_long_sums_would_show_a_bound_that_is_too_wide(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, x = sums_beyond_float32(text)
    packed, _ = dispatch.prepare(tensor, tensor.scheme, torch.float32, features=frozenset())
    monkeypatch.setattr("bitwright.kernels.dequantize._EXACT_COLUMNS", 65536)
    assert not torch.equal(packed(x), reference.linear(x, tensor, tensor.scheme))
