"""4-bit codes in the order in which int8 tensor cores take their left operand from registers.

W [N, B] is padded to row blocks of 16 and column blocks of 64; a block is 512 bytes, 16 to a lane.
Inside a block ::

    row = 8*half + g    column = 32*w1 + 16*w0 + 4*t + b    lane = 4*g + t    g in 0..7, t and b in 0..3
    byte = 16*lane + 8*w1 + 4*w0 + b

A byte holds two codes of one column in two's complement: row g in the low nibble, row g + 8 in the high one. Of the
four bytes of a word, ``word << 4 & 0xf0f0f0f0`` and ``word & 0xf0f0f0f0`` are then two registers of operand A of wgmma
m64nNk32 (and of mma.m16n8k32): 16 · code as int8. The factor 16 leaves the integer sum by a shift; sums stay in 32 bits
as long as B is at most `MAX_COLUMNS`. Like `fragments`, the order knows no tiles and no warps.

8-bit codes need no order: they go through shared memory as rows [N, B].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.kernels.fragments import COLUMNS, ROWS

BYTES = ROWS * COLUMNS // 2  # of a block
STEP = 128  # activations are padded to this many columns, and so are weights
MAX_COLUMNS = 131_071  # (2^31 - 1) / 128²: int8 products, each at most 128 · 128, are summed in int32

_CHUNK = 1 << 24  # codes packed or unpacked at a time
_PLAIN = ("r", "half", "g", "c", "w1", "w0", "t", "b")  # a matrix by rows; r, c: row block, column block
_PACKED = ("r", "c", "g", "t", "w1", "w0", "b", "half")  # a code's place in memory, slowest axis first


def padded(B: int) -> int:
    """Columns of the codes in memory: B rounded up to `STEP`."""
    return -(-B // STEP) * STEP


def pack(codes: Tensor) -> Tensor:
    """int8 [ceil(N / 16), padded(B) / 64, 512] of 4-bit codes int8 [N, B] in [-8, 7], on their device; padding is 0."""
    N, B = codes.shape
    Bp = padded(B)
    if N == 0:
        return codes.new_empty(0, Bp // COLUMNS, BYTES)
    step = max(1, _CHUNK // (Bp * ROWS)) * ROWS
    pieces = []
    for n in range(0, N, step):
        part = codes[n : n + step]
        plain = pad(part, (0, Bp - B, 0, -len(part) % ROWS)).view(-1, 2, 8, Bp // COLUMNS, 2, 2, 4, 4)
        ordered = plain.permute([_PLAIN.index(axis) for axis in _PACKED])
        both = (ordered[..., 0] & 15) | (ordered[..., 1] << 4)
        pieces.append(both.reshape(-1, Bp // COLUMNS, BYTES))
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def unpack(blocks: Tensor, N: int, B: int) -> Tensor:
    """Codes int8 [N, B], the inverse of `pack`."""
    rows, columns = blocks.shape[:2]
    codes = torch.empty(rows * ROWS, columns * COLUMNS, dtype=torch.int8, device=blocks.device)
    step = max(1, _CHUNK // (columns * COLUMNS * ROWS))
    for r in range(0, rows, step):
        codes[r * ROWS : (r + step) * ROWS] = _codes(blocks[r : r + step])
    return codes[:N, :B]


def unpack_rows(blocks: Tensor, index: Tensor, B: int) -> Tensor:
    """Codes int8 [n, B] of rows `index` [n]; only their row blocks are unpacked."""
    columns = blocks.shape[1] * COLUMNS
    rows = torch.empty(len(index), columns, dtype=torch.int8, device=blocks.device)
    step = max(1, _CHUNK // (columns * ROWS))
    for i in range(0, len(index), step):
        some = index[i : i + step]
        part = blocks[some // ROWS]
        whole = _codes(part).view(len(some), ROWS, columns)
        rows[i : i + step] = whole[torch.arange(len(some), device=index.device), some % ROWS]
    return rows[:, :B]


def _codes(blocks: Tensor) -> Tensor:
    """int8 [16 * R, 64 * C] of blocks [R, C, 512]."""
    rows, columns = blocks.shape[:2]
    # A low nibble goes up and comes down again for its sign.
    nibbles = torch.stack((blocks << 4 >> 4, blocks >> 4), dim=-1).view(rows, columns, 8, 4, 2, 2, 4, 2)
    plain = nibbles.permute([_PACKED.index(axis) for axis in _PLAIN])
    return plain.reshape(rows * ROWS, columns * COLUMNS)
