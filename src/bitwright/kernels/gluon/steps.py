"""The steps of a piece of a tile: the words of a stage become weights and meet the tokens of that stage."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from bitwright.kernels.gluon.fragment import load_rows, load_words, of_group, operand, row_layout


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
    """acc plus steps it, it + KWG, ... before `end`, the product of each group multiplied with the scales of its rows.

    For few tokens, whose sums are fewer numbers than weights. Words, not weights, stay in registers from step to step:
    weights would be copied into the operands of the next product, and products are short.
    """
    s = it % C.NS
    mbarrier.wait(full.index(s), (it // C.NS) & 1, pred=it < end)
    words0, words1 = _words(buffers, s, PART, C)
    scale = _of_rows(buffers[3], s, acc, PART)
    zero = _zeros(buffers, s, words0, PART, C)
    GROUPS: gl.constexpr = C.GROUPS
    part = ()
    for _group in gl.static_range(GROUPS):
        part = part + (gl.zeros_like(acc),)
    for _step in range(it, end, C.KWG):
        s = it % C.NS
        part = _products(part, words0, words1, zero, buffers[2].index(s), C)
        it += C.KWG
        more = it < end
        s2 = gl.where(more, it % C.NS, s)  # past the end the old stage is read once more
        mbarrier.wait(full.index(s2), (it // C.NS) & 1, pred=more)
        words0, words1 = _words(buffers, s2, PART, C)
        later = _of_rows(buffers[3], s2, acc, PART)
        zero = _zeros(buffers, s2, words0, PART, C)
        part = _waited(part)
        mbarrier.arrive(empty.index(s), count=1)
        for q in gl.static_range(GROUPS):
            acc += part[q] * scale[q][:, None]
        scale = later
    return acc


@gluon.jit
def words_with_scales(acc, it, end, buffers, full, empty, PART: gl.constexpr, C: gl.constexpr):
    """What `with_scales` gives, with words carried from step to step as in `then_scales`.

    For few tokens and so many groups a step that a product for each would take longer than scales on the weights.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    s = it % C.NS
    mbarrier.wait(full.index(s), (it // C.NS) & 1, pred=it < end)
    words0, words1, scale, zero = _read(buffers, s, PART, C)
    for _step in range(it, end, C.KWG):
        s = it % C.NS
        a = operand(words0, words1, scale, zero, C, OPERAND)
        acc = warpgroup_mma(a, buffers[2].index(s).permute((1, 0)), acc, is_async=True)
        it += C.KWG
        more = it < end
        s2 = gl.where(more, it % C.NS, s)  # past the end the old stage is read once more
        mbarrier.wait(full.index(s2), (it // C.NS) & 1, pred=more)
        words0, words1, scale, zero = _read(buffers, s2, PART, C)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(s), count=1)
    return acc


@gluon.jit
def _products(part, words0, words1, zero, x, C: gl.constexpr):
    """The product of every group of a step, on its way."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, part[0].type.layout, 2)
    GROUPS: gl.constexpr = C.GROUPS
    WIDTH: gl.constexpr = C.BK // GROUPS
    xt = x.permute((1, 0))
    made = ()
    for q in gl.static_range(GROUPS):
        v0 = of_group(words0, q, GROUPS)
        v1 = of_group(words1, q, GROUPS)
        a = operand(v0, v1, zero[q], zero[q], C, OPERAND)
        made = made + (warpgroup_mma(a, xt.slice(q * WIDTH, WIDTH, 0), part[q], use_acc=False, is_async=True),)
    return made


@gluon.jit
def _waited(part):
    """The products, finished."""
    if len(part) == 1:
        return (warpgroup_mma_wait(0, deps=part),)
    else:
        return warpgroup_mma_wait(0, deps=part)


@gluon.jit
def _words(buffers, s, PART: gl.constexpr, C: gl.constexpr):
    """The words that a warpgroup takes of stage s (the second for 3 bits only)."""
    w0 = load_words(buffers[0].index(s), 0, PART, C)
    w1 = w0
    if C.BITS == 3:
        w1 = load_words(buffers[1].index(s), 1, PART, C)
    return w0, w1


@gluon.jit
def _zeros(buffers, s, words0, PART: gl.constexpr, C: gl.constexpr):
    """The zero points of every group of stage s, as `load_rows` gives them."""
    GROUPS: gl.constexpr = C.GROUPS
    zero = ()
    for q in gl.static_range(GROUPS):
        if C.ASYM:
            zero = zero + (load_rows(buffers[4].index(s), q, 1, PART, 4 * C.REST),)
        else:
            zero = zero + ((words0, words0),)
    return zero


@gluon.jit
def _read(buffers, s, PART: gl.constexpr, C: gl.constexpr):
    """Words, scales and zero points of stage s."""
    w0, w1 = _words(buffers, s, PART, C)
    scale = load_rows(buffers[3].index(s), 0, C.GROUPS, PART, 4 * C.REST)
    zero = scale
    if C.ASYM:
        zero = load_rows(buffers[4].index(s), 0, C.GROUPS, PART, 4 * C.REST)
    return w0, w1, scale, zero


@gluon.jit
def _of_rows(scales, s, acc, PART: gl.constexpr):
    """The scales of every group of stage s for the rows of acc, float32."""
    ROWS: gl.constexpr = acc.shape[0]
    GROUPS: gl.constexpr = scales.shape[1]
    values = ()
    for q in gl.static_range(GROUPS):
        row = scales.index(s).slice(q, 1, 0).slice(PART * ROWS, ROWS, 1).load(row_layout(ROWS))
        row = gl.convert_layout(row.reshape([ROWS]), gl.SliceLayout(1, acc.type.layout), True)
        values = values + (row.to(gl.float32),)
    return values
