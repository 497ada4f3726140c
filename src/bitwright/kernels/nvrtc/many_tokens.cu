// Packed weights times 16-bit activations of many tokens: out = x W^T + bias.
//
// Two warps bring stages by TMA, one weights, one tokens; two warpgroups multiply, each half the rows of a tile by TOKENS
// tokens. The weight is the left operand and comes from registers: words of codes (`kernels.fragments`) become pairs of
// 16-bit floats, times the scales of their group with one rounding, while the product before them runs. Blocks of a
// cluster have the same tokens; each brings a part of them to all. A block walks over tiles: the next one's stages arrive while results leave.
// Tiles that are left after full rounds may be cut along K into pieces (`many_sums.cuh`).
//
// It may be launched before the kernel before it has ended: words and scales of the first stages are on their way before
// the wait for that kernel. What the warpgroups read or write in memory comes after a stage that is full, hence after it.
//
// Macros: BITS of a code (2, 3, 4 or 8), FLOAT16 (0: bfloat16), ASYM (with zero points), GROUP (columns of a scale, which
// a step does not cut: 32, 64, 128 for any multiple of it or a whole row, 192 for other multiples of 64), SPAN column
// blocks of a step (1 or 2), CHUNKS of 16 columns whose operands are made at a time (1 or 2), ROWS (128 or 256) and
// TOKENS (a multiple of 16) of a tile, STAGES, CLUSTER (1 or 2 blocks; with 4 it is right, too), BAND token tiles, BIAS (0
// or 1), TMA_OUT (N is a multiple of 8).
#include "many_sums.cuh"
#include "many_tile.cuh"

// ---- the warps that bring stages (one thread of each) ----

struct Source {
    const unsigned char *first, *second;  // words
    const TensorMap &scale, &zero;
};

// Where the weights of a step lie: counted on from step to step, since divisions and products of 64 bits would keep the
// one thread that brings stages from being ahead.
struct Cursor {
    const unsigned char *first[BANDS], *second[BANDS];
    int row, group, phase;  // the group of scales, and the steps of it that are over
};

__device__ __forceinline__ Cursor cursor_at(const Source& from, const Problem& p, int row, int step) {
    Cursor c;
#pragma unroll
    for (int b = 0; b < BANDS; b++) {
        const u64 at = (u64)min(row / 64 + b, p.bands - 1) * p.columns + step * SPAN;  // rows past the end are not written
        c.first[b] = from.first + at * BAND_BYTES;
        c.second[b] = from.second + at * SECOND_BAND_BYTES;
    }
    c.row = row, c.group = GROUPS * step / p.group_steps, c.phase = step % p.group_steps;
    return c;
}

// Everything but tokens: what no earlier kernel writes. blocks: of the step, fewer at the end of a weight; tokens are 0
// there, and whatever stands in shared memory is a weight.
__device__ __forceinline__ void bring_weights(const Source& from, const Memory& m, const Problem& p, u32 stage,
                                              Cursor& c, int blocks) {
    const u32 full = m.full + 8 * stage, words = m.stages + stage * STAGE_BYTES + TOKEN_BYTES;
    const u32 scales = m.scales + stage * SCALE_BYTES;
    const u32 bytes = blocks * BAND_BYTES, second_bytes = blocks * SECOND_BAND_BYTES;
    barrier_expect(full, BANDS * (bytes + second_bytes) + SCALE_BYTES);
#pragma unroll
    for (int b = 0; b < BANDS; b++) {
        bring_run(words + b * SPAN * BAND_BYTES, c.first[b], bytes, full);
        c.first[b] += SPAN * BAND_BYTES;
        if (SECOND_BYTES) {
            bring_run(words + FIRST_BYTES + b * SPAN * SECOND_BAND_BYTES, c.second[b], second_bytes, full);
            c.second[b] += SPAN * SECOND_BAND_BYTES;
        }
    }
    bring(scales, from.scale, full, c.row, c.group);
    if (ASYM) bring(scales + GRID_BYTES, from.zero, full, c.row, c.group);
    if (++c.phase == p.group_steps) c.phase = 0, c.group += GROUPS;
}

// No wait for launches: there is room for the first stages, and for others when tokens came and were used.
__device__ __forceinline__ void produce_weights(const Source& from, const Memory& m, const Problem& p, u32 rank) {
    Ring ring;
    for (int i = blockIdx.x / CLUSTER; i < p.items; i += gridDim.x / CLUSTER) {
        const Item item = item_of(p, i);
        Cursor at = cursor_at(from, p, place(p.M, p.N, item.tile, rank).row, item.first);
        for (int k = item.first; k < item.end; k++, ring.next()) {
            barrier_wait(m.empty + 8 * ring.stage, ring.parity ^ 1);
            bring_weights(from, m, p, ring.stage, at, min(SPAN, p.columns - k * SPAN));
        }
    }
}

__device__ __forceinline__ void produce_tokens(const TensorMap& tokens, const Memory& m, const Problem& p, u32 rank) {
    wait_for_launches();
    allow_launch();
    Ring ring;
    for (int i = blockIdx.x / CLUSTER; i < p.items; i += gridDim.x / CLUSTER) {
        const Item item = item_of(p, i);
        const int token = place(p.M, p.N, item.tile, rank).token;
        for (int k = item.first; k < item.end; k++, ring.next()) {
            const u32 full = m.full + 8 * ring.stage;
            barrier_wait(m.empty + 8 * ring.stage, ring.parity ^ 1);
            barrier_expect(full, TOKEN_BYTES);
#pragma unroll
            for (int b = 0; b < SPAN; b++)
                bring_tokens(m.stages + ring.stage * STAGE_BYTES + b * TOKEN_BLOCK, tokens, full, (k * SPAN + b) * 64,
                             token, rank, TOKEN_ROW);
        }
    }
}

// ---- the warpgroups that multiply ----

// Part by part: one is made ready, in the left operand that is not in use, while the product of the one before runs.
// Ends with a product under way.
template <int part = 0>
__device__ __forceinline__ void add_parts(float (&sums)[BLOCKS][SUMS], Left (&left)[2], Step& step, Ring& ring,
                                          const Memory& m, const Own& own, u32 tokens, bool begins, bool more) {
    multiply<part>(sums, left[part % 2], tokens);
    if constexpr (part + 1 < PARTS) {
        constexpr int chunk = (part + 1) * CHUNKS;
        if constexpr (chunk % 4 == 0) read_block<chunk / 4>(step, own, ring.stage);
    } else if (more) {
        Ring next = ring;
        next.next();
        barrier_wait(m.full + 8 * next.stage, next.parity);
        read_block<0>(step, own, next.stage);
    }
    products_wait<1>();
    if (part == 0 && !begins) give_back(m.empty, ring.before());
    set_left<(part + 1) % PARTS>(left[(part + 1) % 2], step);
    if constexpr (part + 1 < PARTS) add_parts<part + 1>(sums, left, step, ring, m, own, tokens, begins, more);
    else ring.next();
}

__device__ __forceinline__ void add_step(float (&sums)[BLOCKS][SUMS], Left (&left)[2], Step& step, Ring& ring,
                                         const Memory& m, const Own& own, bool begins, bool more) {
    // From one lane: the compiler then knows that all have the same, and finds the operands of a step in uniform registers.
    const u32 tokens = __shfl_sync(0xffffffffu, operand_low(m.stages + ring.stage * STAGE_BYTES), 0);
    add_parts(sums, left, step, ring, m, own, tokens, begins, more);
}

__device__ __forceinline__ void add_products(float (&sums)[BLOCKS][SUMS], Ring& ring, const Memory& m, const Own& own,
                                             int steps) {
    Step step;
    Left left[2];
    barrier_wait(m.full + 8 * ring.stage, ring.parity);
    read_block<0>(step, own, ring.stage);
    set_left<0>(left[0], step);
    for (int k = 0; k < steps; k++) add_step(sums, left, step, ring, m, own, k == 0, k + 1 < steps);
}

__device__ __forceinline__ void consume(const TensorMap& results, u16* out, const void* bias, float* partial,
                                        int* counters, const Memory& m, const Problem& p, u32 rank) {
    const Own own = own_of(m);
    Ring ring;
    u32 turn = 0;
    for (int i = blockIdx.x / CLUSTER; i < p.items; i += gridDim.x / CLUSTER) {
        const Item item = item_of(p, i);
        const Place at = place(p.M, p.N, item.tile, rank);
        const int first = at.row + 64 * BLOCKS * (threadIdx.x / 128);
        float sums[BLOCKS][SUMS];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
            for (int j = 0; j < SUMS; j++) sums[b][j] = 0.0f;
        add_products(sums, ring, m, own, item.steps());
        products_wait<0>();
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) products_done(sums[b]);
        give_back(m.empty, ring.before());
        if (item.steps() < p.steps && !settle(sums, partial, counters, m, p, item, rank)) continue;
#if BIAS
        add_bias(sums, bias, p.N, first);
#endif
        write(sums, results, out, m.slots, turn, p.M, p.N, at.token, first);
    }
#if TMA_OUT
    if (threadIdx.x % 128 == 0) wait_taken();
#endif
}

// In clusters of CLUSTER blocks; first, second: words of codes (the second of 3 bits only).
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    many_tokens(const __grid_constant__ TensorMap tokens, const __grid_constant__ TensorMap scale,
                const __grid_constant__ TensorMap zero, const __grid_constant__ TensorMap results,
                const unsigned char* first, const unsigned char* second, const void* bias, u16* out, float* partial,
                int* counters, int M, int N, int bands, int columns, int steps, int group_steps, int whole, int cuts, int items) {
    extern __shared__ unsigned char memory[];
    Memory m;
    m.stages = (shared_address(memory) + 1023) & ~1023u;
    m.slots = m.stages + STAGES * STAGE_BYTES;
    m.scales = m.slots + RESULT_BYTES;
    m.full = m.scales + STAGES * SCALE_BYTES;
    m.empty = m.full + 8 * STAGES;
    m.flags = m.empty + 8 * STAGES;
    const u32 rank = CLUSTER == 1 ? 0 : cluster_rank();
    const Problem problem = {M, N, bands, columns, steps, group_steps, whole, cuts, items};
    init_stages(m.full, m.empty, 2);
    if (threadIdx.x >= 128 * WARPGROUPS) {
        set_registers_down<40>();
        // Two, since one thread would bring stages more slowly than they are used in tiles of few tokens.
        const u32 warp = warp_number() - 4 * WARPGROUPS;
        if (warp == 0 && elected()) {
            fetch_map(scale);
            produce_weights({first, second, scale, zero}, m, problem, rank);
        } else if (warp == 1 && elected()) {
            fetch_map(tokens);
            produce_tokens(tokens, m, problem, rank);
        }
        __syncwarp();
    } else {
        set_registers_up<232>();
        consume(results, out, bias, partial, counters, m, problem, rank);
    }
    if (CLUSTER > 1) cluster_sync();
}
