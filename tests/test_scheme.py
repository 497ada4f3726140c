"""Scheme strings, their limits and the bits they cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import SchemeError
from bitwright.scheme import MIN_GROUP_SIZE, WEIGHT_BITS, Scheme, WeightScheme


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    if draw(st.booleans()) and draw(st.booleans()):
        return Scheme(WeightScheme(8), activation_bits=8)
    group_size = draw(st.none() | st.integers(MIN_GROUP_SIZE, 4096))
    return Scheme(WeightScheme(draw(st.sampled_from(WEIGHT_BITS)), group_size, draw(st.booleans())))


@given(schemes())
def test_a_scheme_is_its_string(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(f"  {str(scheme).upper()} ") == scheme


@pytest.mark.parametrize(
    ("text", "weight", "activation_bits"),
    [
        ("w4a16-g128", WeightScheme(4, 128), 16),
        ("w4a16-g64-asym", WeightScheme(4, 64, symmetric=False), 16),
        ("w3a16", WeightScheme(3), 16),
        ("w8a8", WeightScheme(8), 8),
    ],
)
def test_documented_strings(text: str, weight: WeightScheme, activation_bits: int) -> None:
    assert Scheme.parse(text) == Scheme(weight, activation_bits)
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "w4a16-g128"),
        ("int4", "w4a16-g128"),
        ("w4a16-g", "w4a16-g128"),
        ("w4a16 -g64", "w4a16-g128"),
        ("w4a16-g64-asym-g64", "w4a16-g128"),
        ("w5a16", "5 .*choose one of"),
        ("w4a4", "4 .*choose one of"),
        ("w4a16-g0", "group size 0"),
        ("w4a16-g4", "group size 4"),
        ("w4a8", "w8a8"),
        ("w8a8-g128", "w8a8"),
        ("w8a8-asym", "w8a8"),
    ],
)
def test_meaningless_strings_say_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Scheme.parse(text)


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (8, -128, 127)])
def test_range_of_codes(bits: int, low: int, high: int) -> None:
    assert (WeightScheme(bits).qmin, WeightScheme(bits).qmax) == (low, high)


def test_bits_per_weight_counts_scales_zero_points_and_the_ragged_group() -> None:
    assert WeightScheme(4, 128).bits_per_weight(4096) == 4 + 16 / 128
    assert WeightScheme(4, 64, symmetric=False).bits_per_weight(576) == 4 + (16 + 4) / 64
    assert WeightScheme(8).bits_per_weight(512) == 8 + 16 / 512
    ragged = WeightScheme(4, 128)
    assert ragged.num_groups(576) == 5
    assert ragged.bits_per_weight(576) == 4 + 5 * 16 / 576


def test_schemes_are_values() -> None:
    assert len({Scheme.parse("w4a16-g64"), Scheme.parse("w4a16-g64"), Scheme.parse("w4a16")}) == 2
    with pytest.raises(AttributeError):
        Scheme.parse("w8a8").activation_bits = 16  # type: ignore[misc]
