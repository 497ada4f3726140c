"""The Hopper kernel for quantized activations: exact int8 products, then scales, zero points, outliers and the bias.

Built like `kernel`: one warp brings stages by TMA, two warpgroups multiply. 4-bit codes become the register operand of
wgmma by two logic operations for eight of them (they arrive as 16 · code, `kernels.int8_fragments`); 8-bit codes are
read from shared memory by the instruction itself. After the last step over base columns the int32 sums become float32
in the registers that hold them, in the order of roundings that `reference.split_linear` states, and are the
accumulator of the outliers' product, whose operands take the same stages. Programs walk over whole tiles, so the next
tile's stages arrive while this one's results leave.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from bitwright.kernels.gluon.fragment import join8
from bitwright.kernels.gluon.tiles import in_bands
from bitwright.kernels.gluon.write import write


@gluon.jit(do_not_specialize=["M", "steps", "outlier_steps"])
def int8_gemm(
    weight_desc,
    x_desc,
    weight_outliers_desc,
    outliers_desc,
    out_desc,
    out,
    scale,
    zero,
    weight_scale,
    row_sums,
    bias,
    M,
    N,
    steps,
    outlier_steps,
    C: gl.constexpr,
    num_warps: gl.constexpr,
):
    """out [M, N] of `steps` steps over base columns and `outlier_steps` over outliers. C: an `int8.Config`."""
    ws = gl.allocate_shared_memory(weight_desc.dtype, [C.NS] + weight_desc.block_shape, weight_desc.layout)
    xs = gl.allocate_shared_memory(x_desc.dtype, [C.NS] + x_desc.block_shape, x_desc.layout)
    stages = gl.allocate_shared_memory(out_desc.dtype, [2] + out_desc.block_shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [C.NS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [C.NS, 1], mbarrier.MBarrierLayout())
    NS: gl.constexpr = C.NS
    for i in gl.static_range(NS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # both warpgroups give a stage back
    problem = (M, N, gl.cdiv(M, C.BM), gl.cdiv(N, C.BN), steps, outlier_steps)
    outlier_descs = (weight_outliers_desc, outliers_desc)
    load = (weight_desc, x_desc, outlier_descs, ws, xs, full, empty, problem)
    output = (out, out_desc, stages, scale, zero, weight_scale, row_sums, bias)
    use = (ws, xs, outlier_descs, full, empty, output, problem)
    gl.warp_specialize(
        [(_consume, (use, 0, C)), (_consume, (use, 1, C)), (_produce, (load, C))], [4, 1], [C.REGISTERS, 24]
    )


@gluon.jit
def _place(tile, problem, C: gl.constexpr):
    """(first token, tile along N)."""
    _M, _N, nm, nn, _steps, _outlier_steps = problem
    m, n = in_bands(tile, nm, nn, C.GM)
    return m * C.BM, n


@gluon.jit
def _outlier_views(ws, xs, descs, s, C: gl.constexpr):
    """Stage s as outlier columns: of the weight 16-bit [BN, OK], of the tokens [BM, OK]."""
    w_desc, x_desc = descs
    BN: gl.constexpr = C.BN
    BM: gl.constexpr = C.BM
    OK: gl.constexpr = C.OK
    # As many rows as the stage holds; those of the tile are the first. Stages are multiples of 1 KiB, which the swizzle
    # of these views needs of where they begin.
    w = ws.index(s)._reinterpret(w_desc.dtype, [BN * C.BITS * 8 // OK, OK], w_desc.layout)
    x = xs.index(s)._reinterpret(x_desc.dtype, [BM * 64 // OK, OK], x_desc.layout)
    return w.slice(0, BN, 0), x.slice(0, BM, 0)


@gluon.jit
def _produce(load, C: gl.constexpr):
    """One warp: stage after stage, as many ahead as there is room."""
    weight_desc, x_desc, outlier_descs, ws, xs, full, empty, problem = load
    _M, _N, nm, nn, steps, outlier_steps = problem
    BASE: gl.constexpr = C.BN * C.BITS * 16 + C.BM * 128
    OUTLIERS: gl.constexpr = (C.BN + C.BM) * C.OK * 2
    ROWS: gl.constexpr = C.BN // 16 if C.BITS == 4 else C.BN  # what a tile takes of the weight's first axis
    WIDTH: gl.constexpr = weight_desc.block_shape[1]
    it = 0
    for tile in range(gl.program_id(0), nm * nn, gl.num_programs(0)):
        m0, pn = _place(tile, problem, C)
        for k in range(steps):
            s = it % C.NS
            mbarrier.wait(empty.index(s), ((it // C.NS) & 1) ^ 1)
            mbarrier.expect(full.index(s), BASE)
            tma.async_copy_global_to_shared(weight_desc, [pn * ROWS, k * WIDTH], full.index(s), ws.index(s))
            tma.async_copy_global_to_shared(x_desc, [m0, k * 128], full.index(s), xs.index(s))
            it += 1
        if C.OK > 0:
            for o in range(outlier_steps):
                s = it % C.NS
                mbarrier.wait(empty.index(s), ((it // C.NS) & 1) ^ 1)
                mbarrier.expect(full.index(s), OUTLIERS)
                w, x = _outlier_views(ws, xs, outlier_descs, s, C)
                tma.async_copy_global_to_shared(outlier_descs[0], [pn * C.BN, o * C.OK], full.index(s), w)
                tma.async_copy_global_to_shared(outlier_descs[1], [m0, o * C.OK], full.index(s), x)
                it += 1


@gluon.jit
def _consume(use, WG: gl.constexpr, C: gl.constexpr):
    """One warpgroup: its rows of every tile of the program."""
    ws, xs, outlier_descs, full, empty, output, problem = use
    out, out_desc, stages, scale, zero, weight_scale, row_sums, bias = output
    M, N, nm, nn, steps, outlier_steps = problem
    ROWS: gl.constexpr = 64 * C.REST
    BM: gl.constexpr = C.BM
    WIDTH: gl.constexpr = min(BM, 128)  # of one instruction: the compiler knows none of 256 for bytes
    INT8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 32])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    rn = gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    rm = gl.arange(0, BM, gl.SliceLayout(0, MMA))
    it = 0
    for tile in range(gl.program_id(0), nm * nn, gl.num_programs(0)):
        m0, pn = _place(tile, problem, C)
        acc = gl.zeros([ROWS, BM], gl.int32, INT8)
        if C.BITS == 4:
            acc, it = _from_registers(acc, ws, xs, full, empty, it, steps, WG, C)
            acc = acc >> 4  # a sum of 16 · code: nothing is lost
        else:
            acc, it = _from_memory(acc, ws, xs, full, empty, it, steps, WG, C)
        acc = gl.convert_layout(acc, MMA, True)
        n0 = pn * C.BN + WG * ROWS
        n, m = n0 + rn, m0 + rm
        inside, there = n < N, m < M
        of_rows = gl.load(row_sums + n, mask=inside, other=0)
        acc -= of_rows[:, None] * gl.load(zero + m, mask=there, other=0)[None, :]
        y = acc.to(gl.float32) * gl.load(scale + m, mask=there, other=0.0)[None, :]
        y = y * gl.load(weight_scale + n, mask=inside, other=0.0)[:, None]
        if C.OK > 0:
            for _o in range(outlier_steps):
                s = it % C.NS
                mbarrier.wait(full.index(s), (it // C.NS) & 1)
                w, x = _outlier_views(ws, xs, outlier_descs, s, C)
                y = warpgroup_mma(w.slice(WG * ROWS, ROWS, 0), x.permute((1, 0)), y, is_async=True)
                y = warpgroup_mma_wait(0, deps=(y,))
                mbarrier.arrive(empty.index(s), count=1)
                it += 1
        write(y, out, out_desc, stages.index(WG), bias, m0, n0, rm, rn, M, N, C)
    if C.TMA_OUT:
        tma.store_wait(0)


@gluon.constexpr_function
def _word_layout(row_blocks):
    """Registers of one warpgroup for the words [row_blocks, 2 * 128] of a step: a lane holds its four of each block."""
    register = [[0, 1], [0, 2], [0, 128]] + [[4 << i, 0] for i in range((row_blocks // 4).bit_length() - 1)]
    lane = [[0, 4 << i] for i in range(5)]
    return gl.DistributedLinearLayout(register, lane, [[1, 0], [2, 0]], [], [row_blocks, 256])


@gluon.jit
def _from_registers(acc, ws, xs, full, empty, it, steps, WG: gl.constexpr, C: gl.constexpr):
    """acc plus the product over `steps` steps of 4-bit codes; and the number of the step after them."""
    BLOCKS: gl.constexpr = 4 * C.REST
    WORDS: gl.constexpr = _word_layout(BLOCKS)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 4)
    mbarrier.wait(full.index(it % C.NS), (it // C.NS) & 1)
    words = ws.index(it % C.NS).slice(WG * BLOCKS, BLOCKS, 0).load(WORDS)
    for k in range(steps):
        s = it % C.NS
        # Words, not codes, stay in registers from step to step: the compiler would give every byte of them its own.
        acc = warpgroup_mma(_operand(words, C, OPERAND), xs.index(s).permute((1, 0)), acc, is_async=True)
        # The next words come while this product runs; past the end the old stage is read once more.
        it += 1
        more = k + 1 < steps
        s2 = gl.where(more, it % C.NS, s)
        mbarrier.wait(full.index(s2), (it // C.NS) & 1, pred=more)
        words = ws.index(s2).slice(WG * BLOCKS, BLOCKS, 0).load(WORDS)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(s), count=1)
    return acc, it


@gluon.jit
def _operand(words, C: gl.constexpr, OPERAND: gl.constexpr):
    """16 · codes int8 [16 * row blocks, 128] of words int32 [row blocks, 2 * 128]."""
    BLOCKS: gl.constexpr = words.shape[0]
    ASM: gl.constexpr = C.ASM
    CONSTRAINTS: gl.constexpr = C.CONSTRAINTS
    # Output 2 * i + h is the four bytes of word i of a lane, low nibbles (h = 0) or high ones; i = 2 * w1 + w0.
    o = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words], dtype=(gl.int8,) * 8, is_pure=True, pack=4)
    both = join8(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7])
    both = both.reshape([BLOCKS, 2, 8, 4, 4, 2, 2, 2])  # [block, column block, g, t, b, half, w0, w1]
    codes = both.permute((0, 5, 2, 1, 7, 6, 3, 4)).reshape([BLOCKS * 16, 128])
    return gl.convert_layout(codes, OPERAND, True)


@gluon.jit
def _from_memory(acc, ws, xs, full, empty, it, steps, WG: gl.constexpr, C: gl.constexpr):
    """acc plus the product over `steps` steps of 8-bit codes; and the number of the step after them."""
    ROWS: gl.constexpr = 64 * C.REST
    before = it % C.NS
    for k in range(steps):
        s = it % C.NS
        mbarrier.wait(full.index(s), (it // C.NS) & 1)
        w = ws.index(s).slice(WG * ROWS, ROWS, 0)
        acc = warpgroup_mma(w, xs.index(s).permute((1, 0)), acc, is_async=True)
        # One product stays under way while the stage of the one before it is given back.
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
        before = s
        it += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before), count=1)
    return acc, it
