"""Activations to integers: against the definition written out number by number, and what it promises at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.activations import MAX_ROTATION_BLOCK, quantize_asymmetric, quantize_symmetric, rotate, rotation_block

f32 = np.float32


def by_hand(row: np.ndarray, clip: float) -> tuple[list[int], np.float32, int]:
    """The 4-bit definition for one token, a float32 operation at a time."""
    lo = f32(min(row.min(), f32(0)) * f32(clip))
    hi = f32(max(row.max(), f32(0)) * f32(clip))
    scale = f32(f32(hi - lo) / f32(15))
    if scale == 0:
        return [0] * len(row), f32(1), 0
    zero = int(np.rint(f32(-lo / scale))) - 8
    return [int(np.clip(np.rint(f32(x / scale)) + zero, -8, 7)) for x in row], scale, zero


@pytest.mark.parametrize("clip", [1.0, 0.85, 0.6])
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "tiny", "one large", "integers"])
def test_four_bits_are_the_definition(kind: str, clip: float) -> None:
    x = torch.randn(20, 37, generator=torch.Generator().manual_seed(len(kind)))
    x = {
        "normal": x,
        "positive": x.abs(),
        "negative": -x.abs(),
        "tiny": x * 1e-37,
        "one large": torch.where(x > 2, x * 1e4, x),
        "integers": (3 * x).round(),
    }[kind]
    codes, scale, zero = quantize_asymmetric(x, clip)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int8)
    for m, row in enumerate(x.numpy()):
        want = by_hand(row, clip)
        assert (codes[m].tolist(), scale[m, 0].item(), zero[m, 0].item()) == want


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=9), st.sampled_from([1.0, 0.7]))
@settings(max_examples=200, deadline=None)
def test_four_bits_of_any_values(values: list[float], clip: float) -> None:
    x = torch.tensor([values], dtype=torch.float32)
    codes, scale, zero = quantize_asymmetric(x, clip)
    assert (codes[0].tolist(), scale[0, 0].item(), zero[0, 0].item()) == by_hand(x[0].numpy(), clip)
    if clip == 1.0 and 1e-30 < scale.item() < 1e28:
        assert ((codes - zero) * scale - x).abs().max() <= scale.item() * 1.001  # an end may saturate by half a step


def test_zero_stays_zero_and_constant_tokens_keep_their_value() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, -1.0], [2.5, 2.5, 2.5], [-4.0, -4.0, -4.0]])
    codes, scale, zero = quantize_asymmetric(x)
    back = (codes - zero) * scale
    assert (codes[0].tolist(), scale[0].item(), zero[0].item()) == ([0, 0, 0], 1.0, 0)
    assert back[1, 0] == 0
    torch.testing.assert_close(back[2:], x[2:], rtol=1e-6, atol=0)


def test_what_is_not_finite_spoils_its_token_alone() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = float("nan")
    for scale in (quantize_asymmetric(x)[1], quantize_symmetric(x)[1]):
        assert scale.isnan().flatten().tolist() == [False, True, False]


def test_sixteen_bit_inputs_are_widened_first() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for got, want in zip(quantize_asymmetric(x, 0.9), quantize_asymmetric(x.float(), 0.9), strict=True):
        assert torch.equal(got, want)


def hadamard(n: int) -> torch.Tensor:
    """Sylvester's construction, float64."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H


@pytest.mark.parametrize(("K", "block"), [(1, 1), (2, 2), (96, 32), (64, 64), (40, 8), (3, 1)])
def test_rotation_is_the_hadamard_matrix(K: int, block: int) -> None:
    """On small integers every float32 sum is exact, so nothing may differ."""
    x = torch.randint(-50, 50, (5, 2, K), generator=torch.Generator().manual_seed(K)).float()
    whole = torch.block_diag(*[hadamard(block)] * (K // block))
    assert torch.equal(rotate(x, block).double(), x.double() @ whole)
    assert torch.equal(rotate(rotate(x, block), block), x * block)


def test_the_order_of_operations_of_a_rotation() -> None:
    """Neighbours first, then pairs of pairs: float32 sums say in which order they were formed."""
    a, b, c, d = (f32(v) for v in (1.0, 1e-8, 3.0, -7e-8))
    got = rotate(torch.tensor([[a, b, c, d]]), 4)[0].tolist()
    assert got == [(a + b) + (c + d), (a - b) + (c - d), (a + b) - (c + d), (a - b) - (c - d)]


def test_rotation_block() -> None:
    assert [rotation_block(K) for K in (1, 6, 512, 3840, 4096, 1360)] == [1, 2, 512, 256, MAX_ROTATION_BLOCK, 16]
