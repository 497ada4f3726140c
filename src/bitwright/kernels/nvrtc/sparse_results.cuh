// What `sparse_int8.cu` does with sums: in the order of roundings of the reference, and on to memory.
#pragma once
#include "sparse_tile.cuh"

__device__ __forceinline__ float finished(int sum, int zero, int row_sum, float scale, float weight_scale) {
    const int exact = (BITS == 4 ? sum >> 4 : sum) - zero * row_sum;  // a sum of 16 * code loses nothing
    return __fmul_rn(__fmul_rn(__int2float_rn(exact), scale), weight_scale);
}

__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 r;
#if FLOAT16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}

__device__ __forceinline__ float bias_of(const void* bias, int row) {
#if BIAS == 2
    return ((const float*)bias)[row];
#elif FLOAT16
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(((const u16*)bias)[row]));
    return r;
#else
    return __uint_as_float((u32)((const u16*)bias)[row] << 16);
#endif
}

// Results [64 * BLOCKS rows, tokens] of a warpgroup to out [tokens, rows].
__device__ __forceinline__ void write(const float (&y)[BLOCKS][SUMS], const TensorMap& map, u16* out, u32 slots,
                                      const Problem& p, int token, int row) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#if TMA_OUT
    const u32 group = threadIdx.x / 128, matrix = lane / 8;
    const u32 line = 8 * (matrix / 2) + lane % 8, chunk = (2 * warp + matrix % 2) ^ (line & 7);
#pragma unroll
    for (int piece = 0; piece < BLOCKS * TOKENS / PIECE; piece++) {
        const int b = piece % BLOCKS, first = piece / BLOCKS * (PIECE / 8);  // rows; tokens in eights
        const u32 slot = slots + (2 * group + piece % 2) * SLOT_BYTES;
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
#else
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < SUMS; i += 2) {
            const int n = row + 64 * b + 16 * warp + lane / 4 + 4 * (i & 2), m = token + i / 4 * 8 + lane % 4 * 2;
            const u32 both = rounded(y[b][i], y[b][i + 1]);
            if (n < p.N && m < p.M) out[(u64)m * p.N + n] = (u16)both;
            if (n < p.N && m + 1 < p.M) out[(u64)(m + 1) * p.N + n] = (u16)(both >> 16);
        }
#endif
}
