"""2:4 codes in the order in which sparse int8 tensor cores of Hopper take their left operand from registers.

W [N, B] is padded to row blocks of 16 and column blocks of 128. Every aligned group of four columns of a row keeps two
codes: at the columns of its nonzeros, and of the first zeros where there are fewer than two. A block holds the 64 kept
codes of each of its rows, then which columns they had.

Kept codes of 4 bits, 512 bytes, are a block of `int8_fragments`, with kept codes for columns. Of 8 bits, 1024 bytes ::

    row = 8*half + g    kept code = 32*k + 16*w0 + 4*t + b    lane = 4*g + t    g in 0..7, t and b in 0..3
    byte = 512*k + 16*lane + 8*w0 + 4*half + b

`k` is one product: wgmma.mma_async.sp m64nNk64 takes 64 columns. Columns, 256 bytes: a word of 32 bits a lane and
product, in the order that PTX gives for 8-bit operands at sparsity selector 0 ::

    row = 8*(t & 1) + g    group of four = 16*k + 8*(t >> 1) + j    j in 0..7
    word = 2*lane + k      bits 4*j and 4*j + 1: the first column kept, bits 4*j + 2 and 4*j + 3: the second

That is 3 bits per weight for 4-bit codes and 5 for 8-bit ones. The order knows no tiles and no warps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.errors import SchemeError
from bitwright.kernels import int8_fragments
from bitwright.kernels.fragments import COLUMNS, ROWS
from bitwright.kernels.int8_fragments import STEP, padded

GROUP = 4
_KEPT = STEP // 2  # codes of a row that a block keeps
_COLUMN_BYTES = ROWS * STEP // GROUP // 2
_CHUNK = 1 << 22  # codes packed or unpacked at a time; a group takes about 100 bytes meanwhile

_PLAIN = ("r", "half", "g", "c", "k", "w0", "t", "b")  # kept codes of 8 bits by rows; r, c: row block, column block
_PACKED = ("r", "c", "k", "g", "t", "w0", "half", "b")  # a code's place in memory, slowest axis first
_GROUPS = ("r", "t0", "g", "c", "k", "t1", "j")  # groups by rows; t = 2*t1 + t0
_COLUMNS = ("r", "c", "g", "t1", "t0", "k", "j")


def block_bytes(bits: int) -> int:
    """Of 16 rows x 128 columns."""
    return ROWS * _KEPT * bits // 8 + _COLUMN_BYTES


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 [ceil(N / 16), padded(B) / 128, `block_bytes`] of 2:4 codes int8 [N, B], on their device; padding is 0.

    SchemeError if a group of four columns has more than two codes that are not 0, or if there are no columns.
    """
    N, B = codes.shape
    if B == 0:
        raise SchemeError(f"2:4 codes of [{N}, 0]: there are no columns to keep any of")
    Bp = padded(B)
    if N == 0:
        return codes.new_empty(0, Bp // STEP, block_bytes(bits))
    step = max(1, _CHUNK // (Bp * ROWS)) * ROWS
    pieces = []
    for n in range(0, N, step):
        part = codes[n : n + step]
        groups = pad(part, (0, Bp - B, 0, -len(part) % ROWS)).unflatten(1, (-1, GROUP))
        index = _kept_columns(groups, n)
        kept = groups.gather(2, index).flatten(1)
        blocks = int8_fragments.pack(kept) if bits == 4 else _ordered(kept)
        # What int8_fragments calls a column block of 64 are the kept codes of one of ours, padded to an even number.
        pieces.append(torch.cat((blocks[:, : Bp // STEP], _packed_columns(index)), dim=2))
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def unpack(blocks: Tensor, N: int, B: int, bits: int) -> Tensor:
    """Codes int8 [N, B], the inverse of `pack`."""
    rows, columns = blocks.shape[:2]
    codes = torch.empty(rows * ROWS, columns * STEP, dtype=torch.int8, device=blocks.device)
    step = max(1, _CHUNK // (columns * STEP * ROWS))
    for r in range(0, rows, step):
        codes[r * ROWS : (r + step) * ROWS] = _codes(blocks[r : r + step], bits)
    return codes[:N, :B]


def unpack_rows(blocks: Tensor, index: Tensor, B: int, bits: int) -> Tensor:
    """Codes int8 [n, B] of rows `index` [n]; only their row blocks are unpacked."""
    columns = blocks.shape[1] * STEP
    rows = torch.empty(len(index), columns, dtype=torch.int8, device=blocks.device)
    step = max(1, _CHUNK // (columns * ROWS))
    for i in range(0, len(index), step):
        some = index[i : i + step]
        part = blocks[some // ROWS]
        whole = _codes(part, bits).view(len(some), ROWS, columns)
        rows[i : i + step] = whole[torch.arange(len(some), device=index.device), some % ROWS]
    return rows[:, :B]


def _kept_columns(groups: Tensor, first_row: int) -> Tensor:
    """Columns int64 [rows, groups, 2] in 0..3, ascending, that hold every nonzero of groups [rows, groups, 4]."""
    nonzero = groups != 0
    count = nonzero.sum(2)
    if bool((count > 2).any()):
        row, group = (int(i) for i in (count > 2).nonzero()[0])
        raise SchemeError(
            f"row {first_row + row}, columns {GROUP * group} to {GROUP * group + GROUP - 1}: {int(count[row, group])} "
            "codes are not 0, 2:4 allows 2; prune the weight, or use a scheme that is not sparse"
        )
    # Nonzeros first, each kind by ascending column; then the two that lead, in order.
    rank = torch.arange(GROUP, device=groups.device) + GROUP * ~nonzero
    return rank.argsort(dim=2)[..., :2].sort(dim=2).values


def _ordered(kept: Tensor) -> Tensor:
    """8-bit blocks [R, C, 1024] of kept codes [16 * R, 64 * C]."""
    plain = kept.view(-1, 2, 8, kept.shape[1] // _KEPT, 2, 2, 4, 4)
    return plain.permute([_PLAIN.index(axis) for axis in _PACKED]).reshape(*plain.shape[:1], plain.shape[3], -1)


def _packed_columns(index: Tensor) -> Tensor:
    """int8 [R, C, 256] of columns [16 * R, 32 * C, 2]."""
    both = index[..., 0] | index[..., 1] << 2
    groups = both.view(-1, 2, 8, both.shape[1] // (STEP // GROUP), 2, 2, 8)
    nibbles = groups.permute([_GROUPS.index(axis) for axis in _COLUMNS]).unflatten(6, (4, 2))
    packed = (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8).view(torch.int8)
    return packed.reshape(groups.shape[0], groups.shape[3], _COLUMN_BYTES)


def _codes(blocks: Tensor, bits: int) -> Tensor:
    """int8 [16 * R, 128 * C] of blocks [R, C, `block_bytes`]."""
    R, C = blocks.shape[:2]
    held, packed = blocks.split((blocks.shape[2] - _COLUMN_BYTES, _COLUMN_BYTES), dim=2)
    if bits == 4:
        kept = int8_fragments.unpack(held, R * ROWS, C * COLUMNS)
    else:
        order = [_PACKED.index(axis) for axis in _PLAIN]
        kept = held.reshape(R, C, 2, 8, 4, 2, 2, 4).permute(order).reshape(R * ROWS, C * _KEPT)
    both = packed.reshape(R, C, 8, 2, 2, 2, 4).view(torch.uint8)
    nibbles = torch.stack((both & 15, both >> 4), dim=-1).flatten(6)
    groups = nibbles.permute([_COLUMNS.index(axis) for axis in _GROUPS]).reshape(R * ROWS, -1)
    index = torch.stack((groups & 3, groups >> 2), dim=2).to(torch.int64)
    codes = torch.zeros(*groups.shape, GROUP, dtype=torch.int8, device=blocks.device)
    return codes.scatter_(2, index, kept.view(*groups.shape, 2)).flatten(1)
