"""Packing against a bit stream built from Python integers, against compressed-tensors, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import FormatError
from bitwright.packing import pack_rows, pack_ternary, packed_words, unpack_rows, unpack_ternary

BITS = (2, 3, 4, 8)


def codes_of(R: int, C: int, bits: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (R, C), generator=torch.Generator().manual_seed(seed))


def bit_stream(row: list[int], bits: int, words: int) -> list[int]:
    """The words of one row as Python integers: the definition of the layout."""
    stream = sum(value << (j * bits) for j, value in enumerate(row))
    data = stream.to_bytes(4 * words, "little")
    return [int.from_bytes(data[4 * i : 4 * i + 4], "little", signed=True) for i in range(words)]


@given(bits=st.sampled_from(BITS), R=st.integers(0, 4), C=st.integers(0, 75), seed=st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_rows_are_a_dense_little_endian_bit_stream_and_come_back(bits: int, R: int, C: int, seed: int) -> None:
    codes = codes_of(R, C, bits, seed)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (R, packed_words(C, bits)) and words.is_contiguous()
    assert words.tolist() == [bit_stream(row, bits, packed_words(C, bits)) for row in codes.tolist()]
    assert unpack_rows(words, bits, C).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("C", [1, 31, 32, 33, 64, 100])
def test_words_equal_those_of_compressed_tensors(bits: int, C: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(5, C, bits, seed=C)
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_rows(codes, bits), helpers.pack_to_int32(signed, bits))


def test_documented_word() -> None:
    """q = -8 … -1, stored as 0 … 7, is 0x76543210."""
    codes = torch.arange(-8, 0) + 8
    assert pack_rows(codes.view(1, 8), 4).tolist() == [[0x76543210]]


def test_three_bits_cross_words() -> None:
    """Value 10 occupies bits 30-32: two bits end the first word, one begins the second."""
    codes = torch.zeros(1, 32, dtype=torch.int64)
    codes[0, 10] = 0b111
    first, second, third = (word & 0xFFFFFFFF for word in pack_rows(codes, 3)[0].tolist())
    assert (first, second, third) == (0b11 << 30, 0b1, 0)


@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced"])
def test_views_pack_like_copies(layout: str) -> None:
    base = codes_of(40, 40, 3, seed=1).to(torch.uint8)
    view = {"transposed": base.t(), "strided": base[::2], "sliced": base[:, 3:36]}[layout]
    before = base.clone()
    words = pack_rows(view, 3)
    assert torch.equal(words, pack_rows(view.clone(memory_format=torch.contiguous_format), 3))
    wide = torch.zeros(words.shape[0], words.shape[1] + 2, dtype=torch.int32)
    wide[:, 1:-1] = words
    assert torch.equal(unpack_rows(wide[:, 1:-1], 3, view.shape[1]), view)
    assert torch.equal(base, before)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.tensor([[0, 16]]), 4, r"\[0, 15\].*\[0, 16\]"),
        (torch.tensor([[-1, 3]]), 2, r"\[0, 3\].*\[-1, 3\]"),
        (torch.zeros(2, 2), 4, "integer matrix"),
        (torch.zeros(4, dtype=torch.int32), 4, "integer matrix"),
        (torch.zeros(1, 4, dtype=torch.int32), 5, "5-bit"),
    ],
)
def test_bad_codes_are_refused(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        pack_rows(codes, bits)


@pytest.mark.parametrize(
    ("words", "C"), [(torch.zeros(2, 3, dtype=torch.int32), 33), (torch.zeros(2, 3, dtype=torch.int64), 24)]
)
def test_bad_words_are_refused(words: torch.Tensor, C: int) -> None:
    with pytest.raises(FormatError):
        unpack_rows(words, 4, C)


@given(R=st.integers(0, 4), C=st.integers(0, 33), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_ternary_is_base_three_and_comes_back(R: int, C: int, seed: int) -> None:
    codes = torch.randint(-1, 2, (R, C), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (R, -(-C // 5))
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        filled = row + [0] * (-C % 5)
        assert stored == [
            sum((t + 1) * 3**j for j, t in enumerate(filled[i : i + 5])) for i in range(0, len(filled), 5)
        ]
    back = unpack_ternary(packed, C)
    assert back.dtype == torch.int8 and torch.equal(back, codes)


def test_every_byte_of_five_trits_comes_back() -> None:
    every = torch.arange(243, dtype=torch.uint8).view(1, -1)
    assert torch.equal(pack_ternary(unpack_ternary(every, 243 * 5)), every)


def test_ternary_refuses_what_is_not_ternary() -> None:
    with pytest.raises(FormatError, match=r"\[-1, 1\].*\[0, 2\]"):
        pack_ternary(torch.tensor([[0, 2]]))
    with pytest.raises(FormatError, match=r"\[0, 242\].*243"):
        unpack_ternary(torch.tensor([[243]], dtype=torch.uint8), 5)
    with pytest.raises(FormatError, match="2 bytes"):
        unpack_ternary(torch.tensor([[1]], dtype=torch.uint8), 6)
    with pytest.raises(FormatError, match="uint8"):
        unpack_ternary(torch.tensor([[1]], dtype=torch.int8), 5)
