"""The steps of a piece of a tile: the words of a stage become weights and meet the tokens of that stage."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from bitwright.kernels.gluon.fragment import load_rows, operand, word_layout


@gluon.jit
def with_scales(acc, it, end, buffers, full, empty, PART: gl.constexpr, C: gl.constexpr):
    """acc plus steps it, it + KWG, ... before `end`, scales multiplied onto the weights.

    The next operand is made while a product runs, which pays where products are long: many tokens.
    """
    xs = buffers[2]
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    s = it % C.NS
    mbarrier.wait(full.index(s), (it // C.NS) & 1, pred=it < end)
    words0, words1, scale, zero = _read(buffers, s, PART, C)
    a = operand(words0, words1, scale, zero, C, OPERAND)
    for _step in range(it, end, C.KWG):
        s = it % C.NS
        acc = warpgroup_mma(a, xs.index(s).permute((1, 0)), acc, is_async=True)
        it += C.KWG
        more = it < end
        s2 = gl.where(more, it % C.NS, s)  # past the end the old stage is read once more
        mbarrier.wait(full.index(s2), (it // C.NS) & 1, pred=more)
        words0, words1, scale, zero = _read(buffers, s2, PART, C)
        a = operand(words0, words1, scale, zero, C, OPERAND)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(s), count=1)
    return acc


@gluon.jit
def then_scales(acc, it, end, buffers, full, empty, PART: gl.constexpr, C: gl.constexpr):
    """acc plus steps it, it + KWG, ... before `end`, the product of each multiplied with the scales of its rows.

    For few tokens, whose sums are fewer numbers than weights. Words, not weights, stay in registers from step to step:
    weights would be copied into the operands of the next product, and products are short.
    """
    xs = buffers[2]
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    s = it % C.NS
    mbarrier.wait(full.index(s), (it // C.NS) & 1, pred=it < end)
    words0, words1, _none, zero = _read(buffers, s, PART, C)
    scale = _of_rows(buffers[3], s, acc, PART)
    part = gl.zeros_like(acc)
    for _step in range(it, end, C.KWG):
        s = it % C.NS
        a = operand(words0, words1, zero, zero, C, OPERAND)
        part = warpgroup_mma(a, xs.index(s).permute((1, 0)), part, use_acc=False, is_async=True)
        it += C.KWG
        more = it < end
        s2 = gl.where(more, it % C.NS, s)  # past the end the old stage is read once more
        mbarrier.wait(full.index(s2), (it // C.NS) & 1, pred=more)
        words0, words1, _none, zero = _read(buffers, s2, PART, C)
        later = _of_rows(buffers[3], s2, acc, PART)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(empty.index(s), count=1)
        acc += part * scale[:, None]
        scale = later
    return acc


@gluon.jit
def _read(buffers, s, PART: gl.constexpr, C: gl.constexpr):
    """What a warpgroup takes of stage s: words (words1 for 3 bits only), scales unless they come late, zero points."""
    words0, words1, _xs, scales, zeros = buffers
    BLOCKS: gl.constexpr = 4 * C.REST
    w0 = words0.index(s).slice(PART * BLOCKS, BLOCKS, 0).load(word_layout(C.BITS, 0, BLOCKS, C.BK // 64))
    w1 = w0
    if C.BITS == 3:
        w1 = words1.index(s).slice(PART * BLOCKS, BLOCKS, 0).load(word_layout(3, 1, BLOCKS, C.BK // 64))
    scale = (w0, w0)
    if not C.LATE:
        scale = load_rows(scales.index(s), PART, BLOCKS)
    zero = scale
    if C.ASYM:
        zero = load_rows(zeros.index(s), PART, BLOCKS)
    return w0, w1, scale, zero


@gluon.jit
def _of_rows(scales, s, acc, PART: gl.constexpr):
    """The scales of stage s for the rows of acc, float32."""
    ROWS: gl.constexpr = acc.shape[0]
    rows = scales.index(s).reshape([scales.shape[2]]).slice(PART * ROWS, ROWS, 0)
    return rows.load(gl.SliceLayout(1, acc.type.layout)).to(gl.float32)
