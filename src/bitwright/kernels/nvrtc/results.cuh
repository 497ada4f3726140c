// Results of a tile in float32 registers, on to memory: rounded once, in long rows through shared memory and TMA where
// rows of `out` begin at multiples of 16 bytes (TMA_OUT), otherwise value by value.
//
// Macros: those of tile.cuh, FLOAT16 (0: bfloat16), BIAS (0: none, 1: as the result, 2: float32), TMA_OUT.
#pragma once
#include "half.cuh"
#include "tile.cuh"

constexpr int PIECE = TOKENS % 32 == 0 ? 32 : 16;  // tokens that are written at a time
constexpr int PIECES = BLOCKS * (TOKENS / PIECE);  // of a warpgroup
constexpr int SLOT_BYTES = PIECE * 128;            // of results: PIECE tokens x 64 outputs
constexpr int RESULT_BYTES = TMA_OUT ? WARPGROUPS * 2 * SLOT_BYTES : 0;
static_assert(TOKENS % PIECE == 0, "tokens come in sixteens");

__device__ __forceinline__ float bias_of(const void* bias, int row) {
#if BIAS == 2
    return ((const float*)bias)[row];
#else
    return number_of(((const u16*)bias)[row]);
#endif
}

// row: the first of the warpgroup.
__device__ __forceinline__ void add_bias(float (&y)[BLOCKS][SUMS], const void* bias, int N, int row) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int n = row + 64 * b + 16 * warp + lane / 4 + 8 * h;
            const float added = n < N ? bias_of(bias, n) : 0.0f;
#pragma unroll
            for (int i = 2 * h; i < SUMS; i += 4) {
                y[b][i] = __fadd_rn(y[b][i], added);
                y[b][i + 1] = __fadd_rn(y[b][i + 1], added);
            }
        }
}

// Results [64 * BLOCKS rows, tokens] of a warpgroup to out [tokens, rows]. turn: of the two slots the next one, at first
// 0.
__device__ __forceinline__ void write(const float (&y)[BLOCKS][SUMS], const TensorMap& map, u16* out, u32 slots,
                                      u32& turn, int M, int N, int token, int row) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#if TMA_OUT
    const u32 group = threadIdx.x / 128, matrix = lane / 8;
    const u32 line = 8 * (matrix / 2) + lane % 8, chunk = (2 * warp + matrix % 2) ^ (line & 7);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const int b = piece % BLOCKS, first = piece / BLOCKS * (PIECE / 8);  // rows; tokens in eights
        const u32 slot = slots + (2 * group + (piece + turn) % 2) * SLOT_BYTES;
#pragma unroll
        for (int j = 0; j < PIECE / 8; j += 2) {
            const float* v = &y[b][4 * (first + j)];
            write_transposed(slot + (8 * j + line) * 128 + chunk * 16, rounded(v[0], v[1]), rounded(v[2], v[3]),
                             rounded(v[4], v[5]), rounded(v[6], v[7]));
        }
        fence_async();
        // After this the other slot is free: its results have been read when the first thread comes here.
        if (threadIdx.x % 128 == 0) wait_taken();
        named_sync(1 + group, 128);
        if (threadIdx.x % 128 == 0) take_away(map, slot, row + 64 * b, token + 8 * first);
    }
    turn = (turn + PIECES) % 2;
#else
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < SUMS; i += 2) {
            const int n = row + 64 * b + 16 * warp + lane / 4 + 4 * (i & 2), m = token + i / 4 * 8 + lane % 4 * 2;
            const u32 both = rounded(y[b][i], y[b][i + 1]);
            if (n < N && m < M) out[(u64)m * N + n] = (u16)both;
            if (n < N && m + 1 < M) out[(u64)(m + 1) * N + n] = (u16)(both >> 16);
        }
#endif
}
