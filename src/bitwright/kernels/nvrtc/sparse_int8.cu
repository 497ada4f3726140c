// 2:4 sparse weights times quantized activations: exact int8 products, then scales, zero points, outliers and the bias.
//
// One warp brings stages by TMA, two warpgroups multiply, each half the rows of a tile by TOKENS tokens. The weight is
// the left operand and comes from registers (`sparse_fragments`): 4-bit codes become bytes, 16 * code, by a shift and two
// logic operations for eight of them, while the product before them runs. Two blocks of a cluster have the same tokens;
// each brings half of them to both. After the last step the int32 sums become float32 in the registers that hold them,
// in the order of roundings that `reference.split_linear` states, and are the accumulator of the outliers' product, whose
// operands take the same stages. A block walks over tiles: the next one's stages arrive while results leave.
//
// Macros: BITS of a code (4 or 8), ROWS (128 or 256) and TOKENS of a tile, STAGES (at least 2), CLUSTER (1 or 2 blocks),
// BAND token tiles, OUTLIERS (0 or 1), FLOAT16 (0: bfloat16), BIAS (0: none, 1: as the result, 2: float32), TMA_OUT (N
// is a multiple of 8).
#include "sparse_tile.cuh"

// ---- the warp that brings stages (one thread of it) ----

struct Maps {
    const TensorMap &weight, &tokens, &weight_outliers, &outliers;
};

__device__ __forceinline__ void produce(const Maps& maps, u32 stages, u32 full, u32 empty, const Problem& p, u32 rank) {
    Ring ring;
    for (int tile = blockIdx.x / CLUSTER; tile < tiles_of(p.M, p.N); tile += gridDim.x / CLUSTER) {
        const Place at = place(p.M, p.N, tile, rank);
        for (int k = 0; k < p.steps; k++, ring.next()) {
            const u32 barrier = full + 8 * ring.stage, stage = stages + ring.stage * STAGE_BYTES;
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            barrier_expect(barrier, STAGE_BYTES);
            bring_tokens(stage, maps.tokens, barrier, k * STEP, at.token, rank, STEP);
            bring(stage + TOKEN_BYTES, maps.weight, barrier, k * (BLOCK_BYTES / 8), at.row / 16);
        }
#if OUTLIERS
        for (int o = 0; o < p.outlier_steps; o++, ring.next()) {
            const u32 barrier = full + 8 * ring.stage, stage = stages + ring.stage * STAGE_BYTES;
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            barrier_expect(barrier, OUTLIER_BYTES);
            bring_tokens(stage, maps.outliers, barrier, o * OUTLIER_STEP, at.token, rank, OUTLIER_ROW);
            bring(stage + TOKENS * OUTLIER_ROW, maps.weight_outliers, barrier, o * OUTLIER_STEP, at.row);
        }
#endif
    }
}

// ---- the warpgroups that multiply ----

// Steps in halves: one is made ready while the product of the other runs. (Whole steps take twice the registers for left
// operands, and were slower.) Ends with a product under way.
__device__ __forceinline__ void add_products(int (&sums)[BLOCKS][SUMS], Ring& ring, u32 stages, u32 full, u32 empty,
                                             int steps) {
    Left low, high;
    barrier_wait(full + 8 * ring.stage, ring.parity);
#if BITS == 4
    Words words = read_words(stages + ring.stage * STAGE_BYTES + TOKEN_BYTES);
    set_left<0>(low, words);
#else
    read_left<0>(low, stages + ring.stage * STAGE_BYTES + TOKEN_BYTES);
#endif
    for (int k = 0; k < steps; k++) {
        const u32 stage = ring.stage, right = stages + stage * STAGE_BYTES;
        products_fence();
        multiply<0>(sums, low, right);
        products_commit();
        products_wait<1>();
        if (k > 0) give_back(empty, ring.before());
#if BITS == 4
        set_left<1>(high, words);
#else
        read_left<1>(high, right + TOKEN_BYTES);
#endif
        products_fence();
        multiply<1>(sums, high, right);
        products_commit();
        ring.next();
        const bool more = k + 1 < steps;
        if (more) barrier_wait(full + 8 * ring.stage, ring.parity);
#if BITS == 4
        if (more) words = read_words(stages + ring.stage * STAGE_BYTES + TOKEN_BYTES);
        products_wait<1>();
        set_left<0>(low, words);
#else
        products_wait<1>();
        if (more) read_left<0>(low, stages + ring.stage * STAGE_BYTES + TOKEN_BYTES);
#endif
    }
}

__device__ __forceinline__ void consume(const TensorMap& results, u16* out, const float* scale, const int* zero,
                                        const float* weight_scale, const int* row_sums, const void* bias, u32 stages,
                                        u32 slots, u32 full, u32 empty, const Problem& p, u32 rank) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Ring ring;
    u32 turn = 0;
    for (int tile = blockIdx.x / CLUSTER; tile < tiles_of(p.M, p.N); tile += gridDim.x / CLUSTER) {
        const Place at = place(p.M, p.N, tile, rank);
        int sums[BLOCKS][SUMS];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
            for (int i = 0; i < SUMS; i++) sums[b][i] = 0;
        add_products(sums, ring, stages, full, empty, p.steps);
        // Scales and zero points of all tokens, a lane those of one in 32; shuffles hand them on.
        int zeros[TOKENS / 32];
        float scales[TOKENS / 32];
#pragma unroll
        for (int c = 0; c < TOKENS / 32; c++) {
            const int m = at.token + 32 * c + lane;
            zeros[c] = m < p.M ? zero[m] : 0;
            scales[c] = m < p.M ? scale[m] : 0.0f;
        }
        products_wait<0>();
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) products_done(sums[b]);
        give_back(empty, ring.before());

        const int first = at.row + 64 * BLOCKS * group, row = first + 16 * warp + lane / 4;
        int of_row[BLOCKS][2];
        float scale_of_row[BLOCKS][2];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int n = row + 64 * b + 8 * h;
                of_row[b][h] = n < p.N ? row_sums[n] : 0;
                scale_of_row[b][h] = n < p.N ? weight_scale[n] : 0.0f;
            }
        float y[BLOCKS][SUMS];
#pragma unroll
        for (int j = 0; j < SUMS / 4; j++)
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const int from = 8 * (j % 4) + lane % 4 * 2 + x;
                const int zero_of_token = __shfl_sync(0xffffffffu, zeros[j / 4], from);
                const float scale_of_token = __shfl_sync(0xffffffffu, scales[j / 4], from);
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int i = 4 * j + 2 * h + x;
                        y[b][i] = finished(sums[b][i], zero_of_token, of_row[b][h], scale_of_token, scale_of_row[b][h]);
                    }
            }
#if OUTLIERS
        for (int o = 0; o < p.outlier_steps; o++) {
            const u32 stage = ring.stage, here = stages + stage * STAGE_BYTES;
            barrier_wait(full + 8 * stage, ring.parity);
            const u64 right = operand<OUTLIER_ROW>(here);
            const u64 left = operand<OUTLIER_ROW>(here + (TOKENS + 64 * BLOCKS * group) * OUTLIER_ROW);
            products_fence();
#pragma unroll
            for (int k = 0; k < OUTLIER_STEP / 16; k++)
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
                    outlier_product(y[b], left + (b * 64 * OUTLIER_ROW + 32 * k) / 16, right + 32 * k / 16);
            products_commit();
            products_wait<1>();
            if (o > 0) give_back(empty, ring.before());
            ring.next();
        }
        products_wait<0>();
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) products_done(y[b]);
        give_back(empty, ring.before());
#endif
#if BIAS
        add_bias(y, bias, p.N, first);
#endif
        write(y, results, out, slots, turn, p.M, p.N, at.token, first);
    }
#if TMA_OUT
    if (threadIdx.x % 128 == 0) wait_taken();
#endif
}

// out [M, N] = the sum over `steps` steps of base columns and `outlier_steps` of outliers. In clusters of CLUSTER blocks.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    sparse_int8(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap tokens,
                const __grid_constant__ TensorMap weight_outliers, const __grid_constant__ TensorMap outliers,
                const __grid_constant__ TensorMap results, u16* out, const float* scale, const int* zero,
                const float* weight_scale, const int* row_sums, const void* bias, int M, int N, int steps,
                int outlier_steps) {
    extern __shared__ unsigned char memory[];
    const u32 stages = (shared_address(memory) + 1023) & ~1023u, slots = stages + STAGES * STAGE_BYTES;
    const u32 full = slots + RESULT_BYTES, empty = full + 8 * STAGES;
    const u32 rank = CLUSTER == 1 ? 0 : cluster_rank();
    const Problem problem = {M, N, steps, outlier_steps};
    init_stages(full, empty, 1);
    if (threadIdx.x >= 128 * WARPGROUPS) {
        set_registers_down<24>();
        if (warp_number() == 4 * WARPGROUPS && elected()) {
            produce({weight, tokens, weight_outliers, outliers}, stages, full, empty, problem, rank);
        }
        __syncwarp();
    } else {
        set_registers_up<240>();
        consume(results, out, scale, zero, weight_scale, row_sums, bias, stages, slots, full, empty, problem, rank);
    }
    if (CLUSTER > 1) cluster_sync();
}
