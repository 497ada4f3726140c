"""Small integers as dense bytes, and back without loss.

Two layouts. Unsigned codes of 2, 3, 4 or 8 bits become a little-endian bit stream per row: value j of a row fills bits
[j*bits, j*bits + bits), least significant bit first, so 3-bit values cross byte and word borders and no bit is wasted
but those that fill up a row's last 32-bit word. Ternary values go five to a byte (3^5 = 243 <= 256, 1.6 bits each).

Eight values of any width fill exactly `bits` whole bytes. Both directions walk that period of eight and treat all rows
and all periods at once in uint8: the Python loop has eight steps whatever the size, and the largest temporary is as
large as the codes themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import FormatError

PACKED_BITS = (2, 3, 4, 8)
TRITS_PER_BYTE = 5
_PERIOD = 8  # values; the shortest run that ends on a byte border for every width
_BLOCK = 32  # values; the shortest run that ends on a word border for every width


def packed_words(C: int, bits: int) -> int:
    """int32 words that hold a row of C codes: ceil(C * bits / 32)."""
    return -(-C * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int32 [R, ceil(C * bits / 32)]: each row of `codes` as a dense little-endian bit stream.

    codes: integer [R, C], every value in [0, 2^bits). bits: 2, 3, 4 or 8. Unused bits of a row's last word are 0.
    Raises FormatError for another width, a tensor that is not an integer matrix, or a value out of range.
    """
    R, C = _check_matrix(codes, "codes")
    _check_bits(bits)
    _check_range(codes, 0, (1 << bits) - 1, f"{bits}-bit codes")
    blocks = -(-C // _BLOCK)  # 32 values fill exactly `bits` words
    periods = blocks * _BLOCK // _PERIOD
    values = torch.nn.functional.pad(codes.to(torch.uint8), (0, blocks * _BLOCK - C)).view(R, periods, _PERIOD)
    words = torch.zeros(R, blocks * bits, dtype=torch.int32, device=codes.device)
    stream = words.view(torch.uint8).view(R, periods, bits)
    for j in range(_PERIOD):
        byte, shift = divmod(j * bits, 8)
        stream[..., byte] |= values[..., j] << shift  # bits above the byte fall off, the next line keeps them
        if shift + bits > 8:
            stream[..., byte + 1] |= values[..., j] >> (8 - shift)
    return words[:, : packed_words(C, bits)].contiguous()


def unpack_rows(words: Tensor, bits: int, C: int) -> Tensor:
    """uint8 [R, C]: the codes of `pack_rows`.

    words: int32 [R, ceil(C * bits / 32)]. Raises FormatError for another dtype, width or number of words.
    """
    R, width = _check_matrix(words, "packed words")
    _check_bits(bits)
    if words.dtype != torch.int32:
        raise FormatError(f"packed words must be int32, not {words.dtype}")
    if width != packed_words(C, bits):
        raise FormatError(
            f"{C} codes of {bits} bits need {packed_words(C, bits)} words a row, but the tensor has {width}; "
            "check the shape and the bits the checkpoint states"
        )
    blocks = -(-C // _BLOCK)
    periods = blocks * _BLOCK // _PERIOD
    whole = torch.nn.functional.pad(words, (0, blocks * bits - width)).contiguous()  # rows of whole blocks
    stream = whole.view(torch.uint8).view(R, periods, bits)
    values = torch.empty(R, periods, _PERIOD, dtype=torch.uint8, device=words.device)
    for j in range(_PERIOD):
        byte, shift = divmod(j * bits, 8)
        value = stream[..., byte] >> shift
        if shift + bits > 8:
            value = value | (stream[..., byte + 1] << (8 - shift))
        values[..., j] = value & ((1 << bits) - 1)
    return values.view(R, periods * _PERIOD)[:, :C].contiguous()


def pack_ternary(codes: Tensor) -> Tensor:
    """uint8 [R, ceil(C / 5)]: trit j of a byte counts (code + 1) * 3^j; missing trits at a row's end are stored as 0.

    codes: integer [R, C] of -1, 0 and 1. Raises FormatError for any other value.
    """
    R, C = _check_matrix(codes, "codes")
    _check_range(codes, -1, 1, "ternary codes")
    width = -(-C // TRITS_PER_BYTE)
    digits = (torch.nn.functional.pad(codes.to(torch.int8), (0, width * TRITS_PER_BYTE - C)) + 1).view(torch.uint8)
    trits = digits.view(R, width, TRITS_PER_BYTE)
    packed = torch.zeros(R, width, dtype=torch.uint8, device=codes.device)
    for j in reversed(range(TRITS_PER_BYTE)):
        packed = packed * 3 + trits[..., j]
    return packed


def unpack_ternary(packed: Tensor, C: int) -> Tensor:
    """int8 [R, C] of -1, 0 and 1: the codes of `pack_ternary`.

    packed: uint8 [R, ceil(C / 5)]. Raises FormatError for another width, dtype, or a byte above 242 (no five trits).
    """
    R, width = _check_matrix(packed, "packed trits")
    if packed.dtype != torch.uint8:
        raise FormatError(f"packed trits must be uint8, not {packed.dtype}")
    if width != -(-C // TRITS_PER_BYTE):
        raise FormatError(f"{C} trits need {-(-C // TRITS_PER_BYTE)} bytes a row, but the tensor has {width}")
    _check_range(packed, 0, 3**TRITS_PER_BYTE - 1, "bytes of five trits")
    trits = torch.empty(R, width, TRITS_PER_BYTE, dtype=torch.uint8, device=packed.device)
    rest = packed
    for j in range(TRITS_PER_BYTE):
        trits[..., j] = rest % 3
        rest = rest // 3
    return trits.view(R, width * TRITS_PER_BYTE)[:, :C].contiguous().view(torch.int8) - 1


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise FormatError(f"cannot pack {bits}-bit codes; choose one of {PACKED_BITS}")


def _check_matrix(tensor: Tensor, what: str) -> tuple[int, int]:
    if tensor.ndim != 2 or tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise FormatError(f"{what} must be an integer matrix [R, C], not {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def _check_range(values: Tensor, low: int, high: int, what: str) -> None:
    """A value out of range would spill into its neighbours and come back as a different weight."""
    if values.numel() == 0:
        return
    smallest, largest = (int(v) for v in torch.aminmax(values))
    if smallest < low or largest > high:
        raise FormatError(f"{what} must lie in [{low}, {high}], but the tensor holds [{smallest}, {largest}]")
