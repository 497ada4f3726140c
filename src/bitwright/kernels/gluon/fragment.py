"""Words of packed codes -> the register operand of wgmma, in Gluon: extract, center, and scale unless that comes later.

Codes lie in the order in which wgmma wants its left operand in registers (`kernels.fragments`), so a thread turns the
words it reads into its own part of the operand: no shared memory, no shuffle. A field of a word is merged into the
mantissa of a 16-bit float by one logic operation and the offset, zero point included, is taken off exactly. Then the
scale is multiplied with one rounding: what `QuantizedTensor.dequantize` gives in that dtype, bit for bit; or, with
LATE, it is left to the sum of the step (`steps.then_scales`), and the weight is not rounded at all.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bitwright.kernels.fragments import BAND, ROWS, WORDS

_BLOCKS = BAND // ROWS  # of a band and a column block
_LINE = 256  # words that TMA takes along one side at most


@gluon.constexpr_function
def stage(bits, plane, bands, column_blocks):
    """The words of a step as TMA brings them: [bands, lines, words of a line], what lies side by side in a band."""
    words = _BLOCKS * WORDS[bits][plane]
    line = min(words, _LINE)
    return [bands, column_blocks * (words // line), line]


@gluon.constexpr_function
def word_layout(bits, plane, bands, column_blocks):
    """Registers of one warpgroup for the words of a `stage`: a lane holds its own words of every block, a warp one row
    block of each band."""
    shape = stage(bits, plane, bands, column_blocks)
    block = WORDS[bits][plane]
    per_lane = 4 if bits in (4, 8) else 2 if plane == 0 else 1
    own = [1 << i for i in range(per_lane.bit_length() - 1)] + ([128] if bits == 8 else [])
    own += [_BLOCKS * block << i for i in range(column_blocks.bit_length() - 1)]
    register = [_place(word, shape) for word in own] + [[1 << i, 0, 0] for i in range(bands.bit_length() - 1)]
    lane = [_place(per_lane << i, shape) for i in range(5)]
    warp = [_place(block << i, shape) for i in range(2)]
    return gl.DistributedLinearLayout(register, lane, warp, [], shape)


@gluon.constexpr_function
def _place(word, shape):
    """Where a word of the first band stands in a `stage`."""
    return [0, word // shape[2], word % shape[2]]


@gluon.constexpr_function
def _words_of_block(bits, plane=0):
    """Words of a block, of the first kind or of the second."""
    return WORDS[bits][plane]


@gluon.jit
def load_words(buffer, PLANE: gl.constexpr, WG: gl.constexpr, C: gl.constexpr):
    """Words of warpgroup WG from a `stage` in shared memory: int32 [row blocks, column blocks * words]."""
    KB: gl.constexpr = C.BK // 64
    W: gl.constexpr = _words_of_block(C.BITS, PLANE)
    words = buffer.slice(WG * C.REST, C.REST, 0).load(word_layout(C.BITS, PLANE, C.REST, KB))
    return words.reshape([C.REST, KB, 4, W]).permute((0, 2, 1, 3)).reshape([4 * C.REST, KB * W])


@gluon.constexpr_function
def row_layout(rows):
    """Registers of one warpgroup for [1, rows]: a lane holds the rows of its part of an accumulator."""
    register = [[0, 8]] + [[0, 64 << i] for i in range((rows // 64).bit_length() - 1)]
    lane = [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout(register, lane, [[0, 16], [0, 32]], [], [1, rows])


@gluon.jit
def load_rows(buffer, FIRST: gl.constexpr, GROUPS: gl.constexpr, WG: gl.constexpr, BLOCKS: gl.constexpr):
    """Scales or zero points of warpgroup WG from shared memory, 16-bit [groups, rows of all warpgroups].

    Gives two int32 [GROUPS, BLOCKS, 8, 4], from group FIRST on: the value of row g and that of row g + 8 of each block,
    in both halves of a word, for each of the four lanes that hold the row.
    """
    LANES: gl.constexpr = gl.BlockedLayout([GROUPS, 1, 2, 1, 1], [1, 1, 1, 8, 4], [1, 4, 1, 1, 1], [4, 3, 2, 1, 0])
    rows = buffer.reshape([buffer.shape[0], buffer.shape[1] // 16, 2, 8]).slice(FIRST, GROUPS, 0)
    value = rows.slice(WG * BLOCKS, BLOCKS, 1).load(gl.SliceLayout(4, LANES))
    word = value.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    word = word | (word << 16)
    word = word.expand_dims(4).broadcast_to([GROUPS, BLOCKS, 2, 8, 4])
    return gl.split(word.permute((0, 1, 3, 4, 2)))


@gluon.jit
def _join4(a, b, c, d):
    """Four tensors -> two trailing dimensions: [..., i, j] is number i + 2 j."""
    return gl.join(gl.join(a, b), gl.join(c, d))


@gluon.jit
def join8(a, b, c, d, e, f, g, h):
    return gl.join(_join4(a, b, c, d), _join4(e, f, g, h))


@gluon.jit
def _halves(pair):
    """[2 groups, blocks, 8, 4] -> two [groups, blocks, 8, 4]: those of the first and second half of column blocks."""
    halves = pair.reshape([pair.shape[0] // 2, 2, pair.shape[1], 8, 4])
    return gl.split(halves.permute((0, 2, 3, 4, 1)))


@gluon.jit
def _per_word(pair, words, C: gl.constexpr):
    """int32 [groups, blocks, 8, 4] (see `load_rows`), repeated onto the words that the values belong to."""
    GROUPS: gl.constexpr = pair.shape[0]
    BLOCKS: gl.constexpr = words.shape[0]
    KB: gl.constexpr = (
        words.shape[1] * (2 if C.BITS == 3 else 1) // _words_of_block(C.BITS)
    )  # of 3 bits, one word of two
    GK: gl.constexpr = min(GROUPS, KB)
    GW: gl.constexpr = GROUPS // GK  # 2: one scale per half of a block
    value = pair.permute((1, 0, 2, 3))
    if C.BITS == 4:
        value = value.reshape([BLOCKS, GK, 1, GW, 8, 4, 1]).permute((0, 1, 2, 4, 5, 3, 6))
        value = value.broadcast_to([BLOCKS, GK, KB // GK, 8, 4, 2, 2])
    elif C.BITS == 2:
        value = value.reshape([BLOCKS, GK, 1, GW, 8, 4]).permute((0, 1, 2, 4, 5, 3))
        value = value.broadcast_to([BLOCKS, GK, KB // GK, 8, 4, 2])
    elif C.BITS == 3:
        value = value.reshape([BLOCKS, GK, 1, 8, 4]).broadcast_to([BLOCKS, GK, KB // GK, 8, 4])
    else:
        value = value.reshape([BLOCKS, GK, 1, GW, 8, 4, 1]).broadcast_to([BLOCKS, GK, KB // GK, 2, 8, 4, 4])
    return gl.convert_layout(value.reshape(words.shape), words.type.layout, True)


@gluon.jit
def _four_per_word(pair0, pair1, words, C: gl.constexpr):
    """What a word of 3-bit codes needs: rows g and g + 8 of the first half of its columns, then of the second."""
    if C.GROUPS > C.BK // 64:
        a0, b0 = _halves(pair0)
        a1, b1 = _halves(pair1)
        return _per_word(a0, words, C), _per_word(a1, words, C), _per_word(b0, words, C), _per_word(b1, words, C)
    else:
        a0 = _per_word(pair0, words, C)
        a1 = _per_word(pair1, words, C)
        return a0, a1, a0, a1


@gluon.jit
def _inputs(pairs, words, C: gl.constexpr):
    """Scales or zero points, as `load_rows` gives them, as operands of the statement for each of the words."""
    p0, p1 = pairs
    if C.BITS == 3:
        a0, a1, b0, b1 = _four_per_word(p0, p1, words, C)
        return [a0, a1, b0, b1]
    else:
        return [_per_word(p0, words, C), _per_word(p1, words, C)]


@gluon.constexpr_function
def _types(kind, count):
    return ((gl.bfloat16 if kind == "bf16" else gl.float16),) * count


@gluon.jit
def of_group(words, q: gl.constexpr, GROUPS: gl.constexpr):
    """Those of words [row blocks, column blocks * words] that hold group q of GROUPS (1 or 2) of equal width."""
    gl.static_assert(GROUPS <= 2, "a step has two column blocks at most, and a group is not narrower than one")
    if GROUPS == 1:
        return words
    else:
        both = gl.split(words.reshape([words.shape[0], 2, words.shape[1] // 2]).permute((0, 2, 1)))
        return both[q]


@gluon.jit
def operand(words0, words1, scale, zero, C: gl.constexpr, OPERAND: gl.constexpr):
    """Words of one warpgroup -> the tile [rows, columns] of the weight as left operand of wgmma.

    words0, words1: int32 [row blocks, column blocks * words] (words1 for 3 bits only), or what `of_group` gives. scale,
    zero: as `load_rows` gives them, for equal parts of the columns; scale is not used with LATE, zero with zero points
    only. C: a `Config`.
    """
    BITS: gl.constexpr = C.BITS
    ASM: gl.constexpr = C.asm
    CONS: gl.constexpr = C.constraints
    REST: gl.constexpr = C.REST
    KB: gl.constexpr = words0.shape[1] // _words_of_block(BITS)
    TYPES: gl.constexpr = _types(C.KIND, 32 if BITS == 3 else 32 // BITS)
    words = [words0]
    if BITS == 3:
        v0, v1 = gl.split(words0.reshape([4 * REST, KB * 32, 2]))
        words = [v0, v1, gl.convert_layout(words1, v0.type.layout, True)]
    if not C.LATE:
        words = words + _inputs(scale, words[0], C)
    if C.ASYM:
        words = words + _inputs(zero, words[0], C)
    o = gl.inline_asm_elementwise(ASM, CONS, words, TYPES, True, 1)
    # Output 2 f + e; joining adds the bits of that number as dimensions, lowest first.
    if BITS == 4:
        w = join8(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7])
        w = w.reshape([REST, 4, KB, 8, 4, 2, 2, 2, 2, 2]).permute((0, 1, 8, 3, 2, 5, 6, 9, 4, 7))
    elif BITS == 2:
        w = gl.join(
            join8(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]),
            join8(o[8], o[9], o[10], o[11], o[12], o[13], o[14], o[15]),
        )
        w = w.reshape([REST, 4, KB, 8, 4, 2, 2, 2, 2, 2]).permute((0, 1, 7, 3, 2, 5, 9, 8, 4, 6))
    elif BITS == 3:
        lower = gl.join(
            join8(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]),
            join8(o[8], o[9], o[10], o[11], o[12], o[13], o[14], o[15]),
        )
        upper = gl.join(
            join8(o[16], o[17], o[18], o[19], o[20], o[21], o[22], o[23]),
            join8(o[24], o[25], o[26], o[27], o[28], o[29], o[30], o[31]),
        )
        w = gl.join(lower, upper).reshape([REST, 4, KB, 8, 4, 2, 2, 2, 2, 2]).permute((0, 1, 6, 3, 2, 9, 8, 7, 4, 5))
    else:
        w = _join4(o[0], o[1], o[2], o[3])
        w = w.reshape([REST, 4, KB, 2, 8, 4, 2, 2, 2, 2]).permute((0, 1, 9, 4, 2, 3, 6, 7, 5, 8))
    return gl.convert_layout(w.reshape([64 * REST, 64 * KB]), OPERAND, True)
