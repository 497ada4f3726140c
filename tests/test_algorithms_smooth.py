"""Factors of SmoothQuant as powers of two: the formula against loops, and the choice among alphas against its error."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from bitwright.activations import quantize_symmetric
from bitwright.algorithms.quik import InputProfile
from bitwright.algorithms.rtn import rtn
from bitwright.algorithms.smooth import ALPHAS, LIMIT, MIN_TOKENS, choose_factors, exponents
from bitwright.scheme import Scheme

W8 = Scheme.parse("w8a8").weight


def profile(x: torch.Tensor) -> InputProfile:
    return InputProfile(x.abs().amax(0), x.square().mean(0), x)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_exponents_are_powers_of_the_largest_value_rounded(alpha: float) -> None:
    largest = randn(33, seed=0).mul(3).exp().tolist()
    raw = [round(math.log2(a**alpha)) for a in largest]
    assert exponents(torch.tensor(largest), alpha).tolist() == [r - statistics.median_low(raw) for r in raw]


def test_dead_channels_move_nothing_and_no_factor_is_beyond_the_limit() -> None:
    largest = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0**40, 2.0**-40])
    assert exponents(largest, 1.0).tolist() == [0, 0, 0, 0, LIMIT, -LIMIT]
    assert exponents(torch.zeros(3), 0.5).tolist() == [0, 0, 0]


def error(x: torch.Tensor, W: torch.Tensor, s: torch.Tensor) -> float:
    """Token by token: the squared error of the product of rounded factors over the squared product, averaged."""
    Q = rtn(W * s, W8, search="minmax").dequantize()
    total = 0.0
    for row in x:
        codes, scale = quantize_symmetric(row / s)
        exact = W @ row
        total += float((Q @ (codes * scale) - exact).square().sum() / exact.square().sum())
    return total / len(x)


def test_the_alpha_with_the_least_error_is_chosen_and_the_error_is_that() -> None:
    x, W = randn(64, 32, seed=2), randn(24, 32, seed=3)
    x[:, 5] *= 100
    x[:, 9] *= 30
    found = choose_factors(profile(x), [W[:8], W[8:]], torch.arange(32), ALPHAS, W8)
    assert found is not None and found.exponents[5] >= found.exponents[9] > 0 and found.error < 0.3
    plain = error(x, W, torch.ones(32))
    each = {alpha: error(x, W, exponents(x.abs().amax(0), alpha).exp2()) / plain for alpha in ALPHAS}
    assert found.alpha == min(each, key=each.__getitem__)
    assert found.error == pytest.approx(each[found.alpha], rel=1e-3)


def test_columns_that_share_a_channel_share_its_factor() -> None:
    """Two heads of keys and values, read by four of queries: column 4 h + d reads channel 4 (h // 2) + d."""
    x, W = randn(64, 16, seed=4), randn(24, 16, seed=5)
    x[:, 4 * 3 + 1] *= 100  # head 3: channel 5
    channel = torch.tensor([4 * (h // 2) + d for h in range(4) for d in range(4)])
    found = choose_factors(profile(x), [W], channel, (0.25,), W8)
    assert found is not None and found.exponents.shape == (8,)
    largest = torch.stack([x.abs().amax(0)[channel == c].max() for c in range(8)])
    assert torch.equal(found.exponents, exponents(largest, 0.25)) and found.exponents.argmax() == 5


def test_no_factors_where_none_help_or_too_little_was_seen() -> None:
    x, W = randn(64, 32, seed=6).sign(), randn(24, 32, seed=7)
    assert choose_factors(profile(x), [W], torch.arange(32), (0.1,), W8) is None  # what is even rounds best as it is
    x[:, 5] *= 100
    assert choose_factors(profile(x[: MIN_TOKENS - 1]), [W], torch.arange(32), ALPHAS, W8) is None
    assert choose_factors(profile(x[:MIN_TOKENS]), [W], torch.arange(32), ALPHAS, W8) is not None
