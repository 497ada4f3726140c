"""Fragments: the one order in which packed weights lie in GPU memory, whatever kernel reads them.

A tensor core wants its left operand spread over the 32 lanes of a warp in a fixed pattern. Codes stored in that
pattern go from memory to the instruction through registers alone: a lane loads whole words, cuts them into codes, and
already holds the right ones. The order depends on the bit width only, not on tiles or warps, so one packed weight
serves every kernel and every tile shape.

W [N, K] is padded to bands of 64 rows and column blocks of 64; what they share is four blocks of 16 x 64, rows first.
Bands lie one after the other, in a band its column blocks, in those the four blocks: what the smallest tile of a kernel
takes in one step, 64 rows of some columns, is one run in memory, and comes faster than four. Inside a block ::

    row = 8*j0 + g    column = 32*w1 + 16*j2 + 8*j1 + 2*t + e    lane = 4*g + t    g in 0..7, t in 0..3, the rest bits

which is the register order of operand A of wgmma and mma.m16n8k16. f = 8*w1 + 4*j2 + 2*j1 + j0 counts the sixteen
pairs (e = 0, 1) of a lane. Words are int32, codes unsigned, u = code + 2^(bits-1), except those of 8 bits:

====  =====================================  ==================================================================
bits  words per block, index of a word       inside a word
====  =====================================  ==================================================================
4     128, lane*4 + w1*2 + j2                nibble 2*j1 + j0 + 4*e
2     64, lane*2 + w1                        half e (0 = low), in it bits 2c, 2c+1 with c = 4*j2 + 2*j1 + j0
3     64, lane*2 + i = v_i (i = 0, 1);       half e of v_i: pairs f = 5i .. 5i+4 at bits 3*(f - 5i), and at bit 15
      and, in a second tensor, 32, lane =    bit i of pair 15
      v_2
8     256, w1*128 + lane*4 + j2*2 + j1       byte j0 + 2*e, two's complement
====  =====================================  ==================================================================

Padding has the value 0: u = 2^(bits-1), or the byte 0. Scales lie transposed, [G, rows], because a kernel reads those
of its rows for one group at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.errors import SchemeError
from bitwright.qtensor import QuantizedTensor

ROWS, COLUMNS = 16, 64  # of a block
BAND = 64  # rows that lie side by side
WORDS = {2: (64,), 3: (64, 32), 4: (128,), 8: (256,)}  # int32 words per block, one entry per tensor of words

_CHUNK = 1 << 24  # codes packed or unpacked at a time
_PLAIN = ("b", "r", "j0", "g", "c", "w1", "j2", "j1", "t", "e")  # a matrix by rows; b, r, c: band, block in it, column
_PACKED = {  # a code's place in memory, slowest axis first
    2: ("b", "c", "r", "g", "t", "w1", "e", "j2", "j1", "j0"),
    3: ("b", "c", "r", "g", "t", "e", "w1", "j2", "j1", "j0"),
    4: ("b", "c", "r", "g", "t", "w1", "j2", "e", "j1", "j0"),
    8: ("b", "c", "r", "w1", "g", "t", "j2", "j1", "e", "j0"),
}
_PER_HALF = 5  # 3-bit codes of a 16-bit half, beside one bit of the sixteenth


class Kind(NamedTuple):
    """What kernels are chosen for beside the number of tokens: a weight [N, K] (or a stack of them) and what meets it.

    group_size: K for one scale per row. dtype: of tokens, scales, zero points, bias and results. asymmetric: with zero
    points. bias: with one.
    """

    N: int
    K: int
    bits: int
    group_size: int
    dtype: torch.dtype
    asymmetric: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Fragments:
    """A weight [N, K], or a stack of E of them, in fragment order.

    words: int32 [N64, K64, 4, W] (two tensors for 3 bits), N64 = ceil(N / 64), K64 = ceil(K / 64), W from `WORDS`.
    scale: [G, 64 * N64], G = ceil(K / group_size). zero: the zero points as numbers, shape and dtype of scale, or
    None. A stack has a leading E in all of them. group_size: an int, K for one scale per row.

    Value: (u - 2^(bits-1) - zero) * scale, the numbers of `QuantizedTensor.dequantize`.
    """

    words: tuple[Tensor, ...]
    scale: Tensor
    zero: Tensor | None
    N: int
    K: int
    bits: int
    group_size: int

    @property
    def experts(self) -> int | None:
        """E of a stack, None for one weight."""
        return self.scale.shape[0] if self.scale.ndim == 3 else None

    def kind(self, dtype: torch.dtype, bias: bool = False) -> Kind:
        """The weight, met by tokens of `dtype`."""
        return Kind(self.N, self.K, self.bits, self.group_size, dtype, self.zero is not None, bias)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything held in memory."""
        held = (*self.words, self.scale)
        return held if self.zero is None else (*held, self.zero)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(t.nbytes for t in self.tensors)


def pack(qt: QuantizedTensor, dtype: torch.dtype) -> Fragments:
    """`qt`, which stays as it is, in fragment order on its own device, for activations of `dtype`.

    Scales keep their dtype where it is `dtype`; all others become float32, which holds them exactly. Columns are taken
    as they are stored: a caller with `qt.order` permutes the activations.
    """
    N, K = qt.shape
    more = -N % BAND
    scale = qt.scale if qt.scale.dtype == dtype else qt.scale.to(torch.float32)
    zero = None if qt.zero_point is None else _per_group(qt.zero_point.to(scale.dtype), more)
    group_size = K if qt.scale.shape[1] == 1 else qt.scheme.group_size
    assert group_size is not None, "one group per row has group_size None"
    return Fragments(_pack(qt.codes, qt.scheme.bits), _per_group(scale, more), zero, N, K, qt.scheme.bits, group_size)


def join(parts: Sequence[Fragments]) -> tuple[Fragments, list[Fragments]] | None:
    """(the rows of all `parts` one after the other, the same parts over views of its words); None if there is no such.

    There is one for weights of one width, group size, dtype and device, of as many columns, all with zero points or
    none, whose rows fill their bands, but for the last.
    """

    def kind(f: Fragments) -> tuple[object, ...]:
        scale = f.scale
        return f.K, f.bits, f.group_size, f.zero is None, f.experts, scale.dtype, scale.device, scale.shape[0]

    first = parts[0]
    if first.experts is not None or len({kind(f) for f in parts}) > 1 or any(f.N % BAND for f in parts[:-1]):
        return None
    words = tuple(_whole(pieces) for pieces in zip(*(f.words for f in parts), strict=True))
    scale = torch.cat([f.scale for f in parts], dim=1)
    zeros = [f.zero for f in parts if f.zero is not None]
    zero = torch.cat(zeros, dim=1) if zeros else None
    whole = replace(first, words=words, scale=scale, zero=zero, N=sum(f.N for f in parts))
    cut = [w.split([f.words[0].shape[0] for f in parts]) for w in words]
    return whole, [replace(f, words=tuple(own)) for f, *own in zip(parts, *cut, strict=True)]


def _whole(pieces: Sequence[Tensor]) -> Tensor:
    """All rows: the tensor that `pieces` are the rows of, in order, if they were joined before, else a copy."""
    base, rows = pieces[0]._base, [len(piece) for piece in pieces]
    if base is not None and len(base) == sum(rows):
        found = zip(base.split(rows), pieces, strict=True)
        if all(a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in found):
            return base
    return torch.cat(list(pieces))


def unpack(fragments: Fragments) -> Tensor:
    """Signed codes int8 [N, K] ([E, N, K] of a stack), the inverse of `pack`."""
    first = fragments.words[0]
    bands, columns = first.shape[-4:-2]
    words = [w.reshape(-1, *w.shape[-3:]) for w in fragments.words]
    step = max(1, _CHUNK // (columns * COLUMNS * BAND))
    codes = torch.empty(words[0].shape[0] * BAND, fragments.K, dtype=torch.int8, device=first.device)
    for b in range(0, words[0].shape[0], step):
        lanes = [_lanes(w[b : b + step], fragments.bits) for w in words]
        piece = _matrix(_unpack_lanes(lanes, fragments.bits), fragments.bits).flatten(0, 3)
        codes[b * BAND : (b + step) * BAND] = piece[:, : fragments.K]
    if fragments.experts is None:
        return codes[: fragments.N]
    return codes.view(-1, bands * BAND, fragments.K)[:, : fragments.N].contiguous()


def dequantize(fragments: Fragments, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] ([E, N, K] of a stack), formed in float32 and rounded once: what kernels are compared with."""
    N = fragments.N
    zero = None if fragments.zero is None else fragments.zero[..., :N]
    return _values(unpack(fragments), fragments.scale[..., :N], zero, fragments.group_size, dtype)


def dequantize_rows(fragments: Fragments, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `index` [n] of one weight, [n, K]; only the lanes that hold them are unpacked."""
    zero = None if fragments.zero is None else fragments.zero[:, index]
    return _values(_row_codes(fragments, index), fragments.scale[:, index], zero, fragments.group_size, dtype)


def stack(weights: Sequence[Fragments]) -> Fragments:
    """Weights of the same shape, bits, groups and scale dtype as one stack with a leading E.

    Raises SchemeError naming the first that differs.
    """
    if not weights:
        raise SchemeError("a stack of experts needs at least one weight")
    first = weights[0]
    for e, w in enumerate(weights):
        if _kind(w) != _kind(first):
            raise SchemeError(f"expert {e} is {_kind(w)}, but expert 0 is {_kind(first)}; a stack holds one kind")
    words = tuple(torch.stack(planes) for planes in zip(*(w.words for w in weights), strict=True))
    zeros = [w.zero for w in weights if w.zero is not None]
    zero = torch.stack(zeros) if zeros else None
    return Fragments(
        words, torch.stack([w.scale for w in weights]), zero, first.N, first.K, first.bits, first.group_size
    )


def random(
    N: int,
    K: int,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    experts: int | None = None,
    generator: torch.Generator | None = None,
) -> Fragments:
    """Random codes over the whole range and small scales of `dtype` and both signs, for measurements.

    Whole bands and columns are made as words, with nothing unpacked on the way; shapes with a tail go through codes, so
    that padding is 0 as everywhere.
    """
    group_size = K if group_size is None else min(group_size, K)
    lead = () if experts is None else (experts,)
    bands, columns = -(-N // BAND), -(-K // COLUMNS)
    made: dict[str, Any] = {"device": device, "generator": generator}
    if N % BAND or K % COLUMNS:
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        codes = [torch.randint(low, high, (N, K), dtype=torch.int8, **made) for _ in range(experts or 1)]
        packed = zip(*(_pack(c, bits) for c in codes), strict=True)
        words = tuple(p[0] if experts is None else torch.stack(p) for p in packed)
    else:
        shapes = [(*lead, bands, columns, BAND // ROWS, width) for width in WORDS[bits]]
        words = tuple(torch.randint(-(1 << 31), 1 << 31, s, dtype=torch.int32, **made) for s in shapes)
    grid = (*lead, -(-K // group_size), bands * BAND)
    scale = (torch.randn(grid, **made) * (K**-0.5 / (1 << (bits - 1)))).to(dtype)
    zero = None if symmetric else torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), grid, **made).to(dtype)
    return Fragments(words, scale, zero, N, K, bits, group_size)


def _row_codes(fragments: Fragments, index: Tensor) -> Tensor:
    """Signed codes int8 [n, K]."""
    block, row = index % BAND // ROWS, index % ROWS
    axes = tuple(_PACKED[fragments.bits].index(axis) for axis in "rg")
    lanes = []
    for w in fragments.words:
        # [n, column blocks, ..., t, words of a lane] of the blocks and lanes of the rows, whose axes are kept as ones
        of_rows = _lanes(w, fragments.bits).movedim(axes, (1, 2))[index // BAND, block, row % 8]
        lanes.append(of_rows[:, None, None].movedim((1, 2), axes))
    both = _matrix(_unpack_lanes(lanes, fragments.bits), fragments.bits)  # [n, 1, j0, 1, K']
    return both[torch.arange(len(index), device=both.device), 0, row // 8, 0, : fragments.K]


def _values(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """(codes - zero) * scale of codes [..., n, K], scale and zero [..., G, n]."""
    K = codes.shape[-1]
    group = torch.arange(K, device=codes.device) // group_size
    values = codes.to(torch.float32)
    if zero is not None:
        values -= zero.to(torch.float32).mT[..., group]
    values *= scale.to(torch.float32).mT[..., group]
    return values.to(dtype)


def _kind(f: Fragments) -> str:
    zero = "symmetric" if f.zero is None else "with zero points"
    return f"[{f.N}, {f.K}] at {f.bits} bits, groups of {f.group_size}, {f.scale.dtype} scales, {zero}"


def _per_group(values: Tensor, more: int) -> Tensor:
    """[G, 64 * N64] of values [N, G], zeros in the rows added."""
    return pad(values.t(), (0, more)).contiguous()


def _pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """int32 words of signed codes [N, K], piece by piece: on the way a 3-bit code takes 20 bytes."""
    N, K = codes.shape
    more_rows, more_columns = -N % BAND, -K % COLUMNS
    step = max(1, _CHUNK // ((K + more_columns) * BAND)) * BAND
    pieces = []
    for n in range(0, N, step):
        part = codes[n : n + step]
        part = pad(part, (0, more_columns, 0, more_rows if n + step >= N else 0))
        plain = part.contiguous().view(torch.uint8)
        if bits != 8:
            plain = plain + (1 << (bits - 1))
        # b, r, j0, g, c, w1, j2, j1, t, e
        plain = plain.view(-1, BAND // ROWS, 2, 8, (K + more_columns) // COLUMNS, 2, 2, 2, 4, 2)
        pieces.append(_join(plain.permute([_PLAIN.index(axis) for axis in _PACKED[bits]]).contiguous(), bits))
    whole = [torch.cat(planes) if len(planes) > 1 else planes[0] for planes in zip(*pieces, strict=True)]
    return tuple(whole)


def _join(ordered: Tensor, bits: int) -> tuple[Tensor, ...]:
    """int32 words of uint8 codes in the axes `_PACKED[bits]`: neighbours share a byte, the first one lowest."""
    blocks = ordered.shape[:3]
    if bits == 3:
        pairs = ordered.reshape(*blocks, 32, 2, 16).to(torch.int32)
        last = pairs[..., 15]
        words = []
        for i in range(3):
            half = ((last >> i) & 1) << 15
            for f in range(_PER_HALF):
                half = half | pairs[..., _PER_HALF * i + f] << (3 * f)
            words.append(half[..., 0] | half[..., 1] << 16)
        return torch.stack(words[:2], dim=-1).flatten(3), words[2]
    per_byte = 8 // bits
    codes = ordered.reshape(-1, per_byte)
    packed = codes[:, 0].clone()
    for i in range(1, per_byte):
        packed |= codes[:, i] << (bits * i)
    return (packed.view(torch.int32).view(*blocks, -1),)


def _lanes(words: Tensor, bits: int) -> Tensor:
    """A view of words [B, C, 4, W] with g and t as axes of their own, and one axis of words per lane (and per w1)."""
    return words.unflatten(-1, (2, 8, 4, 4) if bits == 8 else (8, 4, -1))


def _unpack_lanes(lanes: Sequence[Tensor], bits: int) -> Tensor:
    """Signed int8 codes in the axes `_PACKED[bits]` of what `_lanes` gives; r and g may have any length."""
    first = lanes[0]
    sizes = {axis: first.shape[_PACKED[bits].index(axis)] for axis in "bcrgt"}
    if bits == 3:
        words = torch.cat((first, lanes[1]), dim=-1)
        halves = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=-2)  # [..., e, 3]
        pairs = [(halves[..., i] >> (3 * f)) & 7 for i in range(3) for f in range(_PER_HALF)]
        top = halves >> 15
        pairs.append(top[..., 0] | top[..., 1] << 1 | top[..., 2] << 2)
        unsigned = torch.stack([p.to(torch.uint8) for p in pairs], dim=-1)
    else:
        in_bytes, mask = first.contiguous().view(torch.uint8), (1 << bits) - 1
        unsigned = torch.stack([(in_bytes >> (bits * i)) & mask for i in range(8 // bits)], dim=-1)
    codes = unsigned.view(torch.int8) if bits == 8 else (unsigned - (1 << (bits - 1))).view(torch.int8)
    return codes.reshape([sizes.get(axis, 2) for axis in _PACKED[bits]])


def _matrix(codes: Tensor, bits: int) -> Tensor:
    """[B, r, 2 (j0), g, 64 * C] of codes in the axes `_PACKED[bits]`."""
    plain = codes.permute([_PACKED[bits].index(axis) for axis in _PLAIN])
    return plain.flatten(4)
