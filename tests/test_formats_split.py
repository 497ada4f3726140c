"""Split tensors on disk: everything comes back, bytes are as counted, and damage is named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from split_cases import random_split_tensor

from bitwright.errors import BitwrightError, FormatError, NumericsError
from bitwright.formats import choose, compressed_tensors, native
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

SCHEMES = ["w4a4", "w4a4-o8", "w4a8-o16-24", "w8a8-o16", "w4a4-o8-rot", "w4a16-g16-o8", "w3a16-g16-24", "w16a16-24"]


def assert_same(got: SplitTensor, want: SplitTensor) -> None:
    assert got.scheme == want.scheme
    assert (got.split.bits, got.split.block, got.split.clip) == (want.split.bits, want.split.block, want.split.clip)
    assert torch.equal(got.split.base_idx, want.split.base_idx)
    assert torch.equal(got.split.outlier_idx, want.split.outlier_idx)
    assert torch.equal(got.outliers, want.outliers) and got.outliers.dtype == want.outliers.dtype
    if isinstance(want.base, QuantizedTensor):
        assert torch.equal(got.base.codes, want.base.codes) and torch.equal(got.base.scale, want.base.scale)
    else:
        assert torch.equal(got.base, want.base) and got.base.dtype == want.base.dtype


@given(
    text=st.sampled_from(SCHEMES),
    N=st.integers(1, 20),
    quarter=st.integers(5, 20),
    shuffled=st.booleans(),
    clip=st.sampled_from([1.0, 0.85, 0.6]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_everything_comes_back(
    text: str, N: int, quarter: int, shuffled: bool, clip: float, dtype: torch.dtype, seed: int
) -> None:
    clip = float(torch.tensor(clip)) if "a4" in text else 1.0
    tensor = random_split_tensor(N, 4 * quarter, text, seed, clip=clip, shuffled=shuffled, dtype=dtype)
    stored = native.pack(tensor, tensor.scheme)
    assert all(t.is_contiguous() for t in stored.values())
    back = native.unpack(stored, tensor.scheme)
    assert isinstance(back, SplitTensor)
    assert_same(back, tensor)


@pytest.mark.parametrize("text", SCHEMES)
def test_stored_bytes_are_the_stated_bits_per_weight(text: str) -> None:
    """At widths that fill words and bytes; the shape is not counted."""
    K = 640 if "-o" not in text else 640 + Scheme.parse(text).outliers.count
    tensor = random_split_tensor(32, K, text)
    stored = native.pack(tensor, tensor.scheme)
    assert sum(t.nbytes for key, t in stored.items() if key != "weight_shape") * 8 == tensor.bits_per_weight * 32 * K
    assert tensor.bits_per_weight == tensor.scheme.bits_per_weight(32, K)


@pytest.mark.parametrize("text", ["w4a4-24", "w4a4-o16-24", "w16a16-24"])
def test_an_order_of_columns_and_a_clip_count(text: str) -> None:
    K = 640 if "-o" not in text else 656
    tensor = random_split_tensor(32, K, text, shuffled=True, clip=0.75 if "a4" in text else 1.0)
    stored = native.pack(tensor, tensor.scheme)
    assert stored["weight_base_idx"].dtype == torch.int16
    assert sum(t.nbytes for key, t in stored.items() if key != "weight_shape") * 8 == tensor.bits_per_weight * 32 * K
    assert tensor.bits_per_weight > tensor.scheme.bits_per_weight(32, K) + 16 * 640 / (32 * K) - 1e-9


@pytest.mark.parametrize("K", [48, 1 << 15, (1 << 15) + 4])
def test_columns_are_stored_in_sixteen_bits_where_these_hold_them(K: int) -> None:
    tensor = random_split_tensor(1, K, "w4a4-24", shuffled=True)
    stored = native.pack(tensor, tensor.scheme)
    assert stored["weight_base_idx"].dtype == (torch.int16 if K <= 1 << 15 else torch.int32)
    assert_same(native.unpack(stored, tensor.scheme), tensor)
    older = stored | {"weight_base_idx": stored["weight_base_idx"].to(torch.int32)}
    assert_same(native.unpack(older, tensor.scheme), tensor)


def test_two_of_four_by_hand() -> None:
    """Kept positions: (1, 3), (0, 1), and a group of one value, which keeps a zero beside it."""
    codes = torch.tensor([[0, 5, 0, -3, 7, -8, 0, 0, 0, 0, 2, 0]], dtype=torch.int8)
    tensor = random_split_tensor(1, 12, "w4a4-24")
    tensor = replace(tensor, base=QuantizedTensor(codes, tensor.base.scale, None, tensor.base.scheme))
    stored = native.pack(tensor, tensor.scheme)
    kept = stored["weight_kept"].tolist()
    assert kept[0][0] == (1 | 3 << 2) | (0 | 1 << 2) << 4
    assert kept[0][1] == 0 | 2 << 2  # the zero before it
    words = stored["weight_packed"][0, 0].item()
    assert [(words >> 4 * i & 15) - 8 for i in range(6)] == [5, -3, 7, -8, 0, 2]
    assert_same(native.unpack(stored, tensor.scheme), tensor)


def test_an_input_under_the_threshold_stores_no_outliers() -> None:
    tensor = replace(random_split_tensor(8, 48, "w4a4"), scheme=Scheme.parse("w4a4-o16"))
    stored = native.pack(tensor, tensor.scheme)
    assert set(stored) == {"weight_packed", "weight_scale", "weight_shape"}
    assert_same(native.unpack(stored, tensor.scheme), tensor)


def damaged(key: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensor = random_split_tensor(8, 56, "w4a4-o16-24", clip=0.5, shuffled=True)
    stored = dict(native.pack(tensor, tensor.scheme))
    if value is None:
        del stored[key]
    else:
        stored[key] = value
    return stored


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight_packed", None, r"blk\.up\.weight_packed is missing"),
        ("weight_kept", None, r"blk\.up\.weight_kept is missing"),
        ("weight_kept", torch.zeros(8, 5, dtype=torch.uint8), "one position twice"),
        ("weight_kept", torch.zeros(8, 4, dtype=torch.uint8), r"weight_kept is .*\(8, 4\).*\(8, 5\)"),
        ("weight_outliers", None, r"weight_outliers is missing"),
        ("weight_outliers", torch.zeros(8, 15).bfloat16(), r"\(8, 15\).*\(8, 16\)"),
        ("weight_outliers", torch.zeros(8, 16), "stored in 16 bits"),
        ("weight_outliers", torch.full((8, 16), float("nan")).bfloat16(), r"weight_outliers holds NaN"),
        ("weight_outlier_idx", torch.arange(15, dtype=torch.int32), r"weight_outlier_idx is .*\(15,\)"),
        ("weight_outlier_idx", torch.arange(16), "int64"),
        ("weight_outlier_idx", torch.arange(16, dtype=torch.int32) + 50, r"blk\.up: .*once"),
        ("weight_base_idx", torch.zeros(40, dtype=torch.int32), r"blk\.up: .*once"),
        ("weight_scale", torch.full((8, 1), float("inf")).bfloat16(), r"weight_scale holds NaN or Inf"),
        ("weight_clip", torch.zeros(2), r"blk\.up"),
        ("weight_clip", torch.tensor([float("nan")]), r"blk\.up.*clip"),
    ],
)
def test_damage_is_named(key: str, value: torch.Tensor | None, message: str) -> None:
    with pytest.raises(BitwrightError, match=message):
        native.unpack(damaged(key, value), Scheme.parse("w4a4-o16-24"), "blk.up")


def test_a_column_outside_the_input() -> None:
    tensor = random_split_tensor(8, 56, "w4a4-o16")
    stored = dict(native.pack(tensor, tensor.scheme))
    stored["weight_outlier_idx"] = torch.arange(41, 57, dtype=torch.int32)
    with pytest.raises(FormatError, match="outside the 56"):
        native.unpack(stored, tensor.scheme, "up")


def test_what_cannot_be_written() -> None:
    dense = random_split_tensor(8, 48, "w4a4")
    with pytest.raises(FormatError, match="more than two of four"):
        native.pack(replace(dense, scheme=Scheme.parse("w4a4-24")), Scheme.parse("w4a4-24"), "up")
    with pytest.raises(FormatError, match="quantized at w4a4, but the config would say w4a4-o16"):
        native.pack(dense, Scheme.parse("w4a4-o16"), "up")
    with pytest.raises(NumericsError, match=r"up\.weight_values holds NaN or Inf"):
        pruned = random_split_tensor(8, 48, "w16a16-24")
        base = pruned.base.masked_fill(pruned.base == pruned.base.max(), float("inf"))
        native.pack(replace(pruned, base=base), pruned.scheme, "up")


def test_compressed_tensors_hands_them_to_the_native_format() -> None:
    for text in SCHEMES:
        scheme = Scheme.parse(text)
        assert "use native" in (compressed_tensors.can_express(scheme, 64) or "")
        assert choose({"m.layers.0.up": scheme}, {"m.layers.0.up": 64}) is native
    with pytest.raises(FormatError, match="use native"):
        compressed_tensors.pack(random_split_tensor(8, 48, "w4a4-o16"), Scheme.parse("w4a4-o16"))


def test_configs_name_them() -> None:
    schemes = {f"m.layers.{i}.{p}": Scheme.parse(t) for i in range(3) for p, t in zip("abcdefgh", SCHEMES, strict=True)}
    config = json.loads(json.dumps(native.write_config(schemes, [], {})))
    assert native.read_config(config, list(schemes)) == schemes
