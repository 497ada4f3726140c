"""Orders in which codes lie in memory for the kernels, each with its inverse.

*Planes* (any device): a byte holds codes that are K/2 (4 bits) or K/4 (2 bits) columns apart, so unpacking is one
shift and one mask over whole tensors with no interleaving; 3-bit codes are the dense stream of `packing`, 8-bit ones
plain bytes.

*Int4 blocks* (CPU): what `torch.ops.aten._convert_weight_to_int4pack_for_cpu` makes, in order to read it back. Rows
come in blocks of B; a block is [K, B/2] bytes, the low nibble of row r beside the high nibble of row r + B/2. B is
64 with AVX-512 and 32 with AVX2, so the order is found by asking the operator, and verified.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bitwright.packing import pack_rows, unpack_rows

INT4_ROWS = 64  # rows are padded to this, a multiple of every block in use
_BLOCKS = (64, 32)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """uint8 (int32 for 3 bits) of unsigned codes uint8 [R, C]; C is padded to whole bytes."""
    if bits == 8:
        return codes.clone()
    if bits == 3:
        return pack_rows(codes, bits)
    per_byte = 8 // bits
    C = codes.shape[1]
    width = -(-C // per_byte)
    planes = torch.nn.functional.pad(codes, (0, width * per_byte - C)).view(codes.shape[0], per_byte, width)
    packed = planes[:, 0].clone()
    for j in range(1, per_byte):
        packed |= planes[:, j] << (bits * j)
    return packed


def unpack_planes(packed: Tensor, bits: int, C: int) -> Tensor:
    """uint8 [R, C]: the codes of `pack_planes`."""
    if bits == 8:
        return packed
    if bits == 3:
        return unpack_rows(packed, bits, C)
    per_byte, mask = 8 // bits, (1 << bits) - 1
    R, width = packed.shape
    planes = torch.empty(R, per_byte, width, dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, mask, out=planes[:, 0])
    for j in range(1, per_byte - 1):
        torch.bitwise_and(packed >> (bits * j), mask, out=planes[:, j])
    torch.bitwise_right_shift(packed, bits * (per_byte - 1), out=planes[:, -1])
    return planes.view(R, per_byte * width)[:, :C]


@cache
def int4_block() -> int | None:
    """Rows per block in the order of this build's int4 operator; None if the order is another one."""
    rows, K = torch.meshgrid(torch.arange(2 * INT4_ROWS), torch.arange(32), indexing="ij")
    codes = ((rows * 7 + K * 3 + rows // 16) % 16).to(torch.uint8)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    except (RuntimeError, AttributeError):
        return None
    return next((b for b in _BLOCKS if torch.equal(unpack_int4(packed.view(-1, 32, b // 2)), codes.t())), None)


def pack_int4(codes: Tensor, block: int) -> Tensor:
    """uint8 [R/block, C, block/2] of unsigned 4-bit codes uint8 [R, C], by the operator itself.

    R is a multiple of `INT4_ROWS`, C of 32. Rows go through in pieces: the operator wants int32.
    """
    C = codes.shape[1]
    step = max(INT4_ROWS, (1 << 22) // C // INT4_ROWS * INT4_ROWS)
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    pieces = [convert(codes[r : r + step].to(torch.int32), 1) for r in range(0, codes.shape[0], step)]
    return torch.cat(pieces).view(-1, C, block // 2)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [C, R] (transposed: that is how the blocks lie) of the codes of `pack_int4`."""
    blocks, C, half = packed.shape
    codes = torch.empty(C, blocks, 2, half, dtype=torch.uint8)
    columns = packed.permute(1, 0, 2)
    torch.bitwise_and(columns, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(columns, 4, out=codes[:, :, 1])
    return codes.view(C, -1)


def gather_int4(packed: Tensor, index: Tensor) -> Tensor:
    """uint8 [n, C]: rows `index` [n] of the codes of `pack_int4`."""
    half = packed.shape[2]
    block, row = index // (2 * half), index % (2 * half)
    both = packed[block, :, row % half]
    return torch.where((row < half)[:, None], both & 15, both >> 4)
