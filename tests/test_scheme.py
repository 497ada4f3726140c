"""Scheme strings, their limits and the bits they cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import SchemeError
from bitwright.scheme import MIN_GROUP_SIZE, WEIGHT_BITS, OutlierScheme, Scheme, WeightScheme


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    kind = draw(st.sampled_from(["plain", "integer", "split", "pruned"]))
    if kind == "pruned":
        return Scheme(WeightScheme(16), sparse=True)
    outliers = None
    if kind != "plain":
        counts = st.integers(1, 4096).map(lambda n: OutlierScheme(count=n))
        shares = st.sampled_from([0.5, 5.0, 12.25, 99.0]).map(lambda p: OutlierScheme(share=p))
        outliers = draw(st.none() | counts | shares)
    if kind == "integer":
        bits, activation_bits = draw(st.sampled_from([(4, 4), (4, 8), (8, 8)]))
        return Scheme(WeightScheme(bits), activation_bits, outliers, draw(st.booleans()), draw(st.booleans()))
    group_size = draw(st.none() | st.integers(MIN_GROUP_SIZE, 4096))
    weight = WeightScheme(draw(st.sampled_from(WEIGHT_BITS)), group_size, kind == "split" or draw(st.booleans()))
    return Scheme(weight, 16, outliers, sparse=kind == "split" and draw(st.booleans()))


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
        ("w4a4", WeightScheme(4), 4),
        ("w4a8", WeightScheme(4), 8),
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
        ("w4a2", "2 .*choose one of"),
        ("w4a16-g0", "group size 0"),
        ("w4a16-g4", "group size 4"),
        ("w3a8", "w8a8"),
        ("w8a4", "w8a8 or w4a4"),
        ("w4a4-g64", "leave out -g"),
        ("w4a16-o0", "keeps no column"),
        ("w4a16-o0%", "between 0 and 100"),
        ("w4a16-o100%", "between 0 and 100"),
        ("w4a16-o64-asym", "w4a16-g128"),
        ("w4a16-asym-o64", "leave out -asym"),
        ("w4a16-g64-asym-24", "leave out -asym"),
        ("w4a16-rot", "leave it out"),
        ("w4a4-24-o64", "w4a16-g128"),
        ("w16a16", "w16a16-24"),
        ("w16a8-24", "only pruned"),
        ("w16a16-o64-24", "only pruned"),
        ("w16a16-g64-24", "leave out -g"),
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


def test_split_schemes() -> None:
    scheme = Scheme.parse("w4a4-o256-rot-24")
    assert scheme == Scheme(WeightScheme(4), 4, OutlierScheme(count=256), rotated=True, sparse=True)
    assert Scheme.parse("w4a8-o2.5%").outliers == OutlierScheme(share=2.5)
    plain = ["w4a16-g128-asym", "w8a8", "w3a16"]
    assert all(Scheme.parse(text).plain for text in plain)
    split = ["w4a4", "w4a8", "w8a8-o16", "w8a8-24", "w8a8-rot", "w4a16-o16", "w4a16-g64-24", "w16a16-24"]
    assert not any(Scheme.parse(text).plain for text in split)


@pytest.mark.parametrize(
    ("text", "K", "width", "columns"),
    [
        ("o256", 4096, 4096, 256),
        ("o256", 4096, None, 256),
        ("o256", 11008, 4096, 688),  # 256 · 11008 / 4096
        ("o256", 2048, 4096, 256),  # narrower inputs take as many
        ("o10", 20, 10, 16),  # what follows from a proportion comes in steps
        ("o5%", 4096, None, 208),  # 204.8
        ("o5%", 64, None, 16),
        ("o90%", 32, None, 16),  # 28.8, and a base column must remain
        ("o97%", 48, None, 32),
        ("o5%", 16, None, 16),  # at least one step, which is then refused by name
    ],
)
def test_outlier_columns(text: str, K: int, width: int | None, columns: int) -> None:
    scheme = Scheme.parse(f"w4a4-{text}")
    assert scheme.outliers is not None
    assert scheme.outliers.columns(K, width) == columns
    assert str(scheme.resolved(K, width)) == f"w4a4-o{columns}"


def test_bits_per_weight_of_split_schemes() -> None:
    """Counted by hand: codes, scales, outlier columns and their indices, positions of the kept weights."""
    N, K = 128, 1024
    assert Scheme.parse("w4a4").bits_per_weight(N, K) == 4 + 16 / K
    assert Scheme.parse("w4a4-o64").bits_per_weight(N, K) == (960 * 4 + 16 + 64 * 16 + 64 * 32 / N) / K
    assert Scheme.parse("w4a4-o64-24").bits_per_weight(N, K) == (480 * 6 + 16 + 64 * 16 + 64 * 32 / N) / K
    assert Scheme.parse("w4a16-g128-24").bits_per_weight(N, K) == 2 + 1 + 16 / 128
    assert Scheme.parse("w16a16-24").bits_per_weight(N, K) == 9


def test_schemes_are_values() -> None:
    assert len({Scheme.parse("w4a16-g64"), Scheme.parse("w4a16-g64"), Scheme.parse("w4a16")}) == 2
    with pytest.raises(AttributeError):
        Scheme.parse("w8a8").activation_bits = 16  # type: ignore[misc]


@pytest.mark.parametrize(
    ("scheme", "option", "expected"),
    [
        ("w4a4-o16", "w8a8", "w8a8-o16"),
        ("w4a4-o16-rot-24", "w8a8", "w8a8-o16-rot-24"),
        ("w8a8-o16", "w8a8", "w8a8-o16"),
        ("w4a4-o16", "w8a8-o32", "w8a8-o32"),
        ("w4a4-rot", "w8a16", "w8a16"),
        ("w4a16-o16", "w8a8", "w4a16-o16"),
        ("w4a16-o16", "w8a8-o32", "w4a16-o16"),
    ],
)
def test_the_scheme_behind_the_activation_function(scheme: str, option: str, expected: str) -> None:
    """It takes the others' extras where it has none of its own, and leaves weight-only schemes alone."""
    assert str(Scheme.parse(scheme).behind_activation(Scheme.parse(option))) == expected
