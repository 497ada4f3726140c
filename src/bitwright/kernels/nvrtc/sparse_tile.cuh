// Stages of `sparse_int8.cu`, its left operand, and sums in the order of roundings of the reference.
#pragma once
#include "instructions.cuh"
#include "results.cuh"

constexpr int STEP = 128, OUTLIER_STEP = 32;
constexpr int BLOCK_BYTES = 256 * BITS / 2 + 256;  // 16 rows x 128 columns: kept codes, then where they stood
constexpr int WEIGHT_BYTES = ROWS / 16 * BLOCK_BYTES, TOKEN_BYTES = TOKENS * STEP;
constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
constexpr int OUTLIER_ROW = 2 * OUTLIER_STEP, OUTLIER_BYTES = (ROWS + TOKENS) * OUTLIER_ROW;
static_assert(OUTLIER_BYTES <= STAGE_BYTES && STAGE_BYTES % 1024 == 0, "");

struct Problem {
    int M, N, steps, outlier_steps;
};

__device__ __forceinline__ float finished(int sum, int zero, int row_sum, float scale, float weight_scale) {
    const int exact = (BITS == 4 ? sum >> 4 : sum) - zero * row_sum;  // a sum of 16 * code loses nothing
    return __fmul_rn(__fmul_rn(__int2float_rn(exact), scale), weight_scale);
}

// ---- the left operand of a step: BLOCKS of 64 rows, two halves of 64 columns ----

struct Left {  // of one half
    u32 codes[BLOCKS][4], where[BLOCKS];  // [rows][register]
};

// Where the words of this thread begin, of its b-th block of 16 rows.
__device__ __forceinline__ u32 block_of(u32 weight, int b) {
    const u32 warp = threadIdx.x / 32;
    return weight + (warp / 4 * (4 * BLOCKS) + b * 4 + warp % 4) * BLOCK_BYTES;
}

// Rows past the end arrive as 0, which names one column twice; every valid word is at least this.
__device__ __forceinline__ u32 valid(u32 where) { return max(where, 0x44444444u); }

#if BITS == 4
struct Words {  // of both halves, as in shared memory
    Words4 codes[BLOCKS];
    Words2 where[BLOCKS];
};

__device__ __forceinline__ Words read_words(u32 weight) {
    const u32 lane = threadIdx.x % 32;
    Words r;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        r.codes[b] = read16(block_of(weight, b) + 16 * lane);
        r.where[b] = read8(block_of(weight, b) + 512 + 8 * lane);
    }
    return r;
}

template <int half>
__device__ __forceinline__ void set_left(Left& left, const Words& words) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 word = words.codes[b].w[2 * half + i];
            asm volatile("" : "+r"(word));  // not before the wait that precedes: it would take registers for longer
            left.codes[b][2 * i] = word << 4 & 0xf0f0f0f0u;
            left.codes[b][2 * i + 1] = word & 0xf0f0f0f0u;
        }
        left.where[b] = valid(words.where[b].w[half]);
        // Nor after the fence that follows.
        asm volatile("" : "+r"(left.codes[b][0]), "+r"(left.codes[b][1]), "+r"(left.codes[b][2]),
                     "+r"(left.codes[b][3]), "+r"(left.where[b]));
    }
}
#else
// Bytes are the operand as they come, into registers that the product before has left.
template <int half>
__device__ __forceinline__ void read_left(Left& left, u32 weight) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        const Words4 codes = read16(block_of(weight, b) + 512 * half + 16 * lane);
#pragma unroll
        for (int i = 0; i < 4; i++) left.codes[b][i] = codes.w[i];
        left.where[b] = valid(read4(block_of(weight, b) + 1024 + 8 * lane + 4 * half));
    }
}
#endif

template <int half>
__device__ __forceinline__ void multiply(int (&sums)[BLOCKS][SUMS], const Left& left, u32 tokens) {
    const u64 right = operand<128>(tokens) + 4 * half;  // 64 bytes
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) sparse_product(sums[b], left.codes[b], right, left.where[b]);
}
