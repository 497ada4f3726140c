"""The Gluon kernel for Hopper: y = x Wᵀ for packed W, warp-specialized, any number of tokens.

One producer warp brings stages of words, scales and activations by TMA; NWG warpgroups turn words into the register
operand of wgmma (`fragment.operand`) and multiply, tokens on the N side, so few tokens waste nothing. How the work is
divided is told in `tiles`, how pieces of a tile are added up in `sums`; results do not depend on timing.

With programmatic dependent launch the words of the first stages, which no earlier kernel writes, are
on their way while the kernel before still runs. Experts must know first where their rows are. Whoever asks with an
earlier launch waits for the kernel that says so, in every program, before it lets the next kernel begin; so whatever is
launched after it begins when the offsets are complete, and if they are the same ones may read them at once: SETTLED.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bitwright.kernels.gluon.steps import then_scales, with_scales, words_with_scales
from bitwright.kernels.gluon.sums import gather, settle
from bitwright.kernels.gluon.tiles import expert_table, place, plan, segment
from bitwright.kernels.gluon.write import write


@gluon.jit(do_not_specialize=["M", "K", "bands", "groups", "tiles_whole", "per"])
def fragment_gemm(
    words0_desc,
    words1_desc,
    x_desc,
    scale_desc,
    zero_desc,
    out_desc,
    out,
    bias,
    partial,
    counters,
    offsets,
    M,
    N,
    K,
    bands,
    groups,
    tiles_whole,
    per,
    C: gl.constexpr,
    num_warps: gl.constexpr,
):
    """out [M, N] = x Wᵀ + bias. C: a `Config`. tiles_whole, per: the division of work (see `plan`).

    With experts, rows offsets[e] ... offsets[e + 1] - 1 of x [M, K] meet weight e of the stack, in which a weight takes
    `bands` bands of words and `groups` rows of scales.
    """
    BN: gl.constexpr = C.BN
    NS: gl.constexpr = C.NS
    gl.static_assert(C.NS % C.KWG == 0, "a stage would change hands (see `_consume`)")
    words0 = gl.allocate_shared_memory(gl.int32, [C.NS] + words0_desc.block_shape, words0_desc.layout)
    words1 = words0
    if C.BITS == 3:
        words1 = gl.allocate_shared_memory(gl.int32, [C.NS] + words1_desc.block_shape, words1_desc.layout)
    xs = gl.allocate_shared_memory(x_desc.dtype, [C.NS, C.BM, C.BK], x_desc.layout)
    scales = gl.allocate_shared_memory(scale_desc.dtype, [C.NS, C.GROUPS, BN], scale_desc.layout)
    zeros = scales
    if C.ASYM:
        zeros = gl.allocate_shared_memory(zero_desc.dtype, [C.NS, C.GROUPS, BN], zero_desc.layout)
    stages = gl.allocate_shared_memory(out_desc.dtype, [C.NWG] + out_desc.block_shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [C.NS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [C.NS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=C.NWG // C.KWG)
    GIVERS: gl.constexpr = max(C.NWG // C.KWG * (C.KWG - 1), 1)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    GIVEN: gl.constexpr = [GIVERS, C.REST * C.BM // 8, 512] if C.KWG > 1 else [1, 1, 1]
    gathered = gl.allocate_shared_memory(gl.float32, GIVEN, PLAIN)
    given = gl.allocate_shared_memory(gl.int64, [GIVERS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [GIVERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GIVERS):
        mbarrier.init(given.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    nn = gl.cdiv(N, BN)
    nk = gl.cdiv(K, C.BK)
    if C.EXPERTS:
        if not C.SETTLED:
            gdc_wait()  # which tiles there are is the result of an earlier kernel
        first, end, _before = expert_table(offsets, C)
        nm = gl.sum(gl.cdiv(end - first, C.BM), 0)
        per = gl.cdiv(nm * nn * nk, gl.num_programs(0))
    else:
        nm = gl.cdiv(M, C.BM)
    problem = (M, N, nm, nn, nk, offsets)
    division = (nm * nn, tiles_whole, per)
    buffers = (words0, words1, xs, scales, zeros)
    output = (out, out_desc, stages, gathered, given, taken)
    use = (buffers, full, empty, output, bias, partial, counters, problem, division)
    descriptors = (words0_desc, words1_desc, x_desc, scale_desc, zero_desc)
    load = (descriptors, buffers, full, empty, problem, division, (bands, groups))
    gl.static_assert(C.NWG == 2 or C.NWG == 4, "one warpgroup loses results, see dev/LOG.md")
    if C.NWG == 2:
        gl.warp_specialize(
            [(_consume, (use, 0, C)), (_consume, (use, 1, C)), (_produce, (load, C))], [4, 1], [C.REGISTERS, 24]
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (use, 0, C)),
                (_consume, (use, 1, C)),
                (_consume, (use, 2, C)),
                (_consume, (use, 3, C)),
                (_produce, (load, C)),
            ],
            [4, 4, 4, 1],
            [C.REGISTERS, C.REGISTERS, C.REGISTERS, 24],
        )


@gluon.jit
def _produce(load, C: gl.constexpr):
    """One warp: stage after stage, as many ahead as there is room."""
    descriptors, buffers, full, empty, problem, division, stack = load
    nk = problem[4]
    x_desc = descriptors[2]
    xs = buffers[2]
    tiles, tiles_whole, per = division
    WORDS: gl.constexpr = C.BN * C.BK * C.BITS // 8
    BYTES: gl.constexpr = WORDS + C.BM * C.BK * 2 + C.BN * C.GROUPS * 2 * (2 if C.ASYM else 1)
    whole, pieces, first_unit, last_unit = plan(tiles, tiles_whole, per, nk)
    # The first stages: words and scales before the wait for the kernel before this one, activations after it.
    ahead = 0
    for i in range(whole + pieces):
        tile, k0, k1 = segment(i, whole, tiles_whole, first_unit, last_unit, nk)
        _m0, _end, pn, expert = place(tile, problem, C)
        for k in range(k0, min(k1, k0 + C.NS - ahead)):
            mbarrier.expect(full.index(ahead), BYTES)
            _load_weights(descriptors, buffers, full, ahead, pn, expert, stack, k, C)
            ahead += 1
    # Warpgroups do not wait: what they read or write in memory beside offsets follows a stage that is full, and none is
    # before its activations came. A program without work waits all the same, since the next kernel counts on it.
    if C.EXPERTS == 0 or C.SETTLED:
        gdc_wait()
    gdc_launch_dependents()
    it = 0
    for i in range(whole + pieces):
        tile, k0, k1 = segment(i, whole, tiles_whole, first_unit, last_unit, nk)
        m0, _end, pn, expert = place(tile, problem, C)
        for k in range(k0, k1):
            s = it % C.NS
            if it >= ahead:
                mbarrier.wait(empty.index(s), ((it // C.NS) & 1) ^ 1)
                mbarrier.expect(full.index(s), BYTES)
                _load_weights(descriptors, buffers, full, s, pn, expert, stack, k, C)
            tma.async_copy_global_to_shared(x_desc, [m0, k * C.BK], full.index(s), xs.index(s))
            it += 1


@gluon.jit
def _load_weights(descriptors, buffers, full, s, pn, expert, stack, k, C: gl.constexpr):
    """Words, scales and zero points of step k into stage s."""
    words0_desc, words1_desc, _x_desc, scale_desc, zero_desc = descriptors
    words0, words1, _xs, scales, zeros = buffers
    bands, groups = stack
    band = expert * bands + pn * (C.BN // 64)
    group = expert * groups + (k * C.BK) // C.GROUP
    tma.async_copy_global_to_shared(words0_desc, [band, k * words0.shape[2], 0], full.index(s), words0.index(s))
    if C.BITS == 3:
        tma.async_copy_global_to_shared(words1_desc, [band, k * words1.shape[2], 0], full.index(s), words1.index(s))
    tma.async_copy_global_to_shared(scale_desc, [group, pn * C.BN], full.index(s), scales.index(s))
    if C.ASYM:
        tma.async_copy_global_to_shared(zero_desc, [group, pn * C.BN], full.index(s), zeros.index(s))


@gluon.jit
def _consume(use, WG: gl.constexpr, C: gl.constexpr):
    """One warpgroup: its rows of every tile, or its share of the steps."""
    buffers, full, empty, output, bias, partial, counters, problem, division = use
    N, nk = problem[1], problem[4]
    out, out_desc, stages, gathered, given, taken = output
    tiles, tiles_whole, per = division
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C.BM, 16])
    ROWS: gl.constexpr = 64 * C.REST
    BM: gl.constexpr = C.BM
    # Warpgroups share a tile by rows, or all take the same rows and every KWG-th of the program's steps.
    KWG: gl.constexpr = C.KWG
    STEP: gl.constexpr = WG % KWG
    PART: gl.constexpr = WG // KWG
    rn = gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    rm = gl.arange(0, C.BM, gl.SliceLayout(0, MMA))
    whole, pieces, first_unit, last_unit = plan(tiles, tiles_whole, per, nk)
    base = 0
    for i in range(whole + pieces):
        tile, k0, k1 = segment(i, whole, tiles_whole, first_unit, last_unit, nk)
        m0, end, pn, _expert = place(tile, problem, C)
        acc = gl.zeros([ROWS, BM], gl.float32, MMA)
        # A stage belongs to one of those that share the steps, through all pieces: NS is a multiple of KWG. Whoever
        # skipped a phase of a barrier would take the one before it for the one after.
        it = base + (STEP + KWG - base % KWG) % KWG
        base += k1 - k0
        if C.LATE:
            acc = then_scales(acc, it, base, buffers, full, empty, PART, C)
        elif C.FEW:
            acc = words_with_scales(acc, it, base, buffers, full, empty, PART, C)
        else:
            acc = with_scales(acc, it, base, buffers, full, empty, PART, C)
        if KWG > 1:
            acc = gather(acc, gathered, given, taken, i, STEP, PART, C)
        if STEP == 0:
            n0 = (pn * (C.NWG // KWG) + PART) * ROWS
            done = k1 - k0 == nk
            if not done:
                done, acc = settle(acc, partial, counters, tile - tiles_whole, k1 == nk, nk, per, PART, C)
            if done:
                write(acc, out, out_desc, stages.index(PART), bias, m0, n0, rm, rn, end, N, C)
    if C.TMA_OUT:
        tma.store_wait(0)
