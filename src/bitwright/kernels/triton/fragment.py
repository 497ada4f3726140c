"""Device code that turns words in fragment order (`kernels.fragments`) into a tile [BN, BK] of weights.

Three steps, all on pairs of 16-bit floats in 32-bit words, because a word holds the codes of columns 2t and 2t + 1 in
its two halves and a tensor core wants exactly that pair in one register:

1. *Take.* ``(word & field) | magic`` puts an unsigned code u into the mantissa of a float whose lowest mantissa bits
   are worth 1 (128 in bf16, 1024 in fp16): the float 128 + u. A field f bits up gives 128 + 2^f u without a shift.
2. *Centre.* One fma takes the magic number, the centre 2^(bits-1) and the zero point off, and divides by 2^f. Every
   result is an integer below 2^8, so this is exact in both dtypes.
3. *Scale.* One multiplication, the only rounding. Scales of another dtype than the activations are float32: the product
   is then formed in float32 and rounded once.

The codes leave in the registers in which mma.m16n8k16 and wgmma want their left operand, so the joins, the permute and
the reshape at the end cost nothing there; elsewhere the compiler moves them.

Two constexpr switches travel through all functions. ASM: pairs are computed by PTX (``fma.rn.bf16x2``); otherwise by
float32 operations on the halves, which the interpreter and other GPUs can do. GROUP: inputs per scale, a multiple of
32, or 0 for one scale per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Whether kernels run in Triton's interpreter: it has no inline assembly, truncates when it makes a bf16, and multiplies
# the bit patterns of bf16 matrices.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 -> DTYPE (bf16 or fp16), to nearest, ties to even."""
    if INTERPRET and DTYPE.is_bf16():
        b = x.to(tl.int32, bitcast=True)
        y = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def _low(pairs, DTYPE: tl.constexpr):
    """The value in the low half of each int32."""
    return pairs.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _high(pairs, DTYPE: tl.constexpr):
    """The value in the high half of each int32."""
    return (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _two(low, high):
    """int32 pairs of two 16-bit tensors."""
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _pair(x, DTYPE: tl.constexpr):
    """int32 with the value x, exact in DTYPE, in both halves."""
    half = rounded(x.to(tl.float32), DTYPE)
    return _two(half, half)


@triton.jit
def _constant(x: tl.constexpr, DTYPE: tl.constexpr):
    """`_pair` of a number."""
    return _pair(tl.full([1], x, tl.float32), DTYPE)


@triton.jit
def _fma(a, b, c, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """a * b + c on pairs, rounded once."""
    if ASM:
        if DTYPE.is_bf16():
            r = tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)
        else:
            r = tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)
    else:
        # The product of two 16-bit floats is exact in float32, and so is each of our sums.
        low = _low(a, DTYPE).to(tl.float32) * _low(b, DTYPE).to(tl.float32) + _low(c, DTYPE).to(tl.float32)
        high = _high(a, DTYPE).to(tl.float32) * _high(b, DTYPE).to(tl.float32) + _high(c, DTYPE).to(tl.float32)
        r = _two(rounded(low, DTYPE), rounded(high, DTYPE))
    return r


@triton.jit
def _take(
    words, SHIFT: tl.constexpr, UP: tl.constexpr, zero, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):
    """Pairs code - zero of the fields at bits SHIFT + UP of both halves; `zero` as pairs, or None."""
    FIELD: tl.constexpr = ((1 << BITS) - 1) << UP
    return _centre(_merge(words >> SHIFT, FIELD, DTYPE, ASM), UP, zero, BITS, DTYPE, ASM)


@triton.jit
def _merge(words, FIELD: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """(words & FIELD) | magic in both halves."""
    BOTH: tl.constexpr = FIELD | (FIELD << 16)
    MAGIC: tl.constexpr = 0x43004300 if DTYPE.is_bf16() else 0x64006400
    if ASM:
        # The compiler does not see that these two are one instruction.
        args = [words, BOTH, MAGIC]
        r = tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,r,r", args, tl.int32, True, 1)
    else:
        r = (words & BOTH) | MAGIC
    return r


@triton.jit
def _centre(u, UP: tl.constexpr, zero, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """u is magic + 2^UP · code; code - zero, with the code signed."""
    BASE: tl.constexpr = 128 if DTYPE.is_bf16() else 1024
    OFFSET: tl.constexpr = BASE / (1 << UP) + (1 << (BITS - 1))
    if zero is None:
        minus = _constant(-OFFSET, DTYPE)
    else:
        minus = _fma(zero, _constant(-1.0, DTYPE), _constant(-OFFSET, DTYPE), DTYPE, ASM)
    return _fma(u, _constant(1.0 / (1 << UP), DTYPE), minus, DTYPE, ASM)


@triton.jit
def load_words(
    words, block_row, block_col, blocks, columns,
    BN: tl.constexpr, BK: tl.constexpr, PER_BLOCK: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """int32 [BK / 64, BN / 16, 8 (g), 4 (t), words of a lane] of the tile at a block row and column; 8 bits: w1 after
    the column blocks.

    blocks, columns: how many row blocks (those of whole bands) and column blocks there are. Blocks beyond them repeat
    the last one: the caller drops what comes out in those rows, and multiplies those columns with 0. STREAM: no other
    program reads the same words.
    """
    NB: tl.constexpr = BN // 16
    KB: tl.constexpr = BK // 64
    # Neighbouring warps read neighbouring row blocks, as they will multiply them: rows vary faster than columns. So the
    # four blocks of a band and a column are read as they lie.
    RUN: tl.constexpr = 128 if PER_BLOCK == 256 else PER_BLOCK
    PARTS: tl.constexpr = PER_BLOCK // RUN
    i = tl.arange(0, NB * KB * PER_BLOCK)
    row = tl.minimum(block_row + i // RUN % NB, blocks - 1)
    part = i // (RUN * NB)
    col = tl.minimum(block_col + part // PARTS, columns - 1)
    block = ((row // 4).to(tl.int64) * columns + col) * 4 + row % 4
    # Wider loads would give a lane the words of its neighbours, which then travel through shared memory.
    at = words + tl.max_contiguous(block * PER_BLOCK + part % PARTS * RUN + i % RUN, RUN // 32)
    w = tl.load(at, eviction_policy="evict_first" if STREAM else "")
    if PARTS == 2:
        return w.reshape([KB, 2, NB, 8, 4, RUN // 32])
    else:
        return w.reshape([KB, NB, 8, 4, RUN // 32])


@triton.jit
def load_rows(
    values, block_row, block_col, blocks, groups,
    J0: tl.constexpr, W1: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Scales or zero points of rows g + 8·J0 and columns 32·W1 + .. of each block: [BK / 64 or 1, BN / 16, 8, 4].

    values [groups, 16 * blocks]. The four lanes of a row read the same number: that is cheaper than moving it.
    """
    NB: tl.constexpr = BN // 16
    KU: tl.constexpr = 1 if GROUP % BK == 0 else BK // 64
    i = tl.arange(0, KU * NB * 32)
    row = tl.minimum(block_row + i // 32 % NB, blocks - 1) * 16 + (i % 32) // 4 + 8 * J0
    if GROUP == 0:
        v = tl.load(values + row)
    elif GROUP % BK == 0:
        group = tl.minimum(block_col * 64 // GROUP, groups - 1)
        v = tl.load(values + group.to(tl.int64) * (blocks * 16) + row)
    else:
        group = tl.minimum(((block_col + i // (32 * NB)) * 64 + 32 * W1) // GROUP, groups - 1)
        v = tl.load(values + group.to(tl.int64) * (blocks * 16) + row)
    return v.reshape([KU, NB, 8, 4])


@triton.jit
def load_groups(values, block_row, block_col, blocks, groups, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """`load_rows` of both j0, with w1 as last axis: [.., 2] where a group can end inside a block, else [.., 1]."""
    r0 = load_rows(values, block_row, block_col, blocks, groups, 0, 0, BN, BK, GROUP)
    r1 = load_rows(values, block_row, block_col, blocks, groups, 1, 0, BN, BK, GROUP)
    if GROUP % 64 == 0:
        return r0.expand_dims(4), r1.expand_dims(4)
    else:
        h0 = load_rows(values, block_row, block_col, blocks, groups, 0, 1, BN, BK, GROUP)
        h1 = load_rows(values, block_row, block_col, blocks, groups, 1, 1, BN, BK, GROUP)
        return tl.join(r0, h0), tl.join(r1, h1)


@triton.jit
def _codes4(w, z0, z1, DTYPE: tl.constexpr, ASM: tl.constexpr):
    w = w.reshape([w.shape[0], w.shape[1], 8, 4, 2, 2])
    if z0 is not None:
        z0 = z0.expand_dims(5)
        z1 = z1.expand_dims(5)
    p0 = _take(w, 0, 0, z0, 4, DTYPE, ASM)
    p1 = _take(w, 4, 0, z1, 4, DTYPE, ASM)
    p2 = _take(w, 8, 0, z0, 4, DTYPE, ASM)
    p3 = _take(w, 12, 0, z1, 4, DTYPE, ASM)
    return tl.join(tl.join(p0, p2), tl.join(p1, p3))


@triton.jit
def _codes2(w, z0, z1, DTYPE: tl.constexpr, ASM: tl.constexpr):
    # Three fields fit into the mantissa of a bf16, so every third one pays a shift.
    p0 = _take(w, 0, 0, z0, 2, DTYPE, ASM)
    p1 = _take(w, 0, 2, z1, 2, DTYPE, ASM)
    p2 = _take(w, 0, 4, z0, 2, DTYPE, ASM)
    p3 = _take(w, 6, 0, z1, 2, DTYPE, ASM)
    p4 = _take(w, 6, 2, z0, 2, DTYPE, ASM)
    p5 = _take(w, 6, 4, z1, 2, DTYPE, ASM)
    p6 = _take(w, 12, 0, z0, 2, DTYPE, ASM)
    p7 = _take(w, 12, 2, z1, 2, DTYPE, ASM)
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
    odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
    return tl.join(even, odd)


@triton.jit
def _codes3(w, v2, z0, z1, DTYPE: tl.constexpr, ASM: tl.constexpr):
    v0, v1 = tl.split(w)
    v2 = v2.reshape(v0.shape)
    # Zero points by j0 and w1: pair f has j0 = f % 2 and w1 = f // 8.
    if z0 is None:
        z00 = z0
        z01 = z0
        z10 = z0
        z11 = z0
    elif z0.shape[4] == 2:
        z00, z01 = tl.split(z0)
        z10, z11 = tl.split(z1)
    else:
        z00 = z0.reshape(z0.shape[:4])
        z10 = z1.reshape(z1.shape[:4])
        z01 = z00
        z11 = z10
    p0 = _take(v0, 0, 0, z00, 3, DTYPE, ASM)
    p1 = _take(v0, 0, 3, z10, 3, DTYPE, ASM)
    p2 = _take(v0, 6, 0, z00, 3, DTYPE, ASM)
    p3 = _take(v0, 6, 3, z10, 3, DTYPE, ASM)
    p4 = _take(v0, 12, 0, z00, 3, DTYPE, ASM)
    p5 = _take(v1, 0, 0, z10, 3, DTYPE, ASM)
    p6 = _take(v1, 0, 3, z00, 3, DTYPE, ASM)
    p7 = _take(v1, 6, 0, z10, 3, DTYPE, ASM)
    p8 = _take(v1, 6, 3, z01, 3, DTYPE, ASM)
    p9 = _take(v1, 12, 0, z11, 3, DTYPE, ASM)
    p10 = _take(v2, 0, 0, z01, 3, DTYPE, ASM)
    p11 = _take(v2, 0, 3, z11, 3, DTYPE, ASM)
    p12 = _take(v2, 6, 0, z01, 3, DTYPE, ASM)
    p13 = _take(v2, 6, 3, z11, 3, DTYPE, ASM)
    p14 = _take(v2, 12, 0, z01, 3, DTYPE, ASM)
    # The sixteenth pair: bit i of its codes is bit 15 of the halves of v_i.
    last = ((v0 >> 15) & 0x00010001) | ((v1 >> 14) & 0x00020002) | ((v2 >> 13) & 0x00040004)
    p15 = _take(last, 0, 0, z11, 3, DTYPE, ASM)
    even = tl.join(tl.join(tl.join(p0, p8), tl.join(p4, p12)), tl.join(tl.join(p2, p10), tl.join(p6, p14)))
    odd = tl.join(tl.join(tl.join(p1, p9), tl.join(p5, p13)), tl.join(tl.join(p3, p11), tl.join(p7, p15)))
    return tl.join(even, odd)


@triton.jit
def _byte(w, SHIFT: tl.constexpr, zero, DTYPE: tl.constexpr, ASM: tl.constexpr):
    if DTYPE.is_bf16():
        # A bf16 has room for seven bits: 128 + low bits, minus 128, or minus 256 where the sign bit is set.
        w = w >> SHIFT
        low = _merge(w, 0x7F, DTYPE, ASM)
        sign = _merge(w, 0x80, DTYPE, ASM)
        code = _fma(sign, _constant(-1.0, DTYPE), low, DTYPE, ASM)
        if zero is None:
            return code
        else:
            return _fma(zero, _constant(-1.0, DTYPE), code, DTYPE, ASM)
    else:
        return _centre(((w >> SHIFT) & 0x00FF00FF) ^ 0x64806480, 0, zero, 8, DTYPE, ASM)


@triton.jit
def _codes8(w, z0, z1, DTYPE: tl.constexpr, ASM: tl.constexpr):
    KB: tl.constexpr = w.shape[0]
    NB: tl.constexpr = w.shape[2]
    w = w.permute((0, 2, 3, 4, 1, 5)).reshape([KB, NB, 8, 4, 2, 2, 2])
    if z0 is not None:
        z0 = z0.expand_dims(5).expand_dims(6)
        z1 = z1.expand_dims(5).expand_dims(6)
    return tl.join(_byte(w, 0, z0, DTYPE, ASM), _byte(w, 8, z1, DTYPE, ASM))


@triton.jit
def weights(w, plane, s0, s1, z0, z1, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The tile [BN, BK] in DTYPE of words from `load_words` (two planes at 3 bits) and what `load_groups` gives."""
    if z0 is not None:
        z0 = _pair(z0, DTYPE)
        z1 = _pair(z1, DTYPE)
    if BITS == 4:
        codes = _codes4(w, z0, z1, DTYPE, ASM)
    elif BITS == 2:
        codes = _codes2(w, z0, z1, DTYPE, ASM)
    elif BITS == 3:
        codes = _codes3(w, plane, z0, z1, DTYPE, ASM)
    else:
        codes = _codes8(w, z0, z1, DTYPE, ASM)
    # codes: pairs [KB, NB, g, t, w1, j2, j1, j0]
    s = tl.join(s0, s1).expand_dims(5).expand_dims(6)
    if s.dtype == DTYPE:
        scaled = _fma(codes, _two(s, s), _constant(-0.0, DTYPE), DTYPE, ASM)
        tile = tl.join(_low(scaled, DTYPE), _high(scaled, DTYPE))
    else:
        low = rounded(_low(codes, DTYPE).to(tl.float32) * s, DTYPE)
        tile = tl.join(low, rounded(_high(codes, DTYPE).to(tl.float32) * s, DTYPE))
    KB: tl.constexpr = codes.shape[0]
    NB: tl.constexpr = codes.shape[1]
    return tile.permute((1, 7, 2, 0, 4, 5, 6, 3, 8)).reshape([NB * 16, KB * 64])
