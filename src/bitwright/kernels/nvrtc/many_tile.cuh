// Steps of `many_tokens.cu`: what a stage holds, and how it becomes left operands.
#pragma once
#include "codes.cuh"
#include "instructions.cuh"
#include "results.cuh"

constexpr int COLUMNS = 64;        // of a step: one column block
constexpr int PARTS = 4 / CHUNKS;  // of a step, products of CHUNKS * 16 columns
constexpr int BANDS = ROWS / 64;   // of a tile
constexpr int TOKEN_ROW = 2 * COLUMNS, TOKEN_BYTES = TOKENS * TOKEN_ROW;
constexpr int FIRST_BYTES = BANDS * 4 * BLOCK_BYTES, WORD_BYTES = FIRST_BYTES + BANDS * 4 * SECOND_BYTES;
constexpr int STAGE_BYTES = TOKEN_BYTES + WORD_BYTES;
constexpr int GRID_BYTES = 2 * GROUPS * ROWS, SCALE_BYTES = (1 + ASYM) * GRID_BYTES;  // scales, then zero points
static_assert(PARTS % 2 == 0, "a step begins with the left operand that the one before did not end with");
static_assert(STAGE_BYTES % 1024 == 0 && GRID_BYTES % 128 == 0, "TMA and its swizzle want aligned boxes");

struct Problem {
    int M, N;
    int bands, steps;        // of the weight
    int group_steps;         // of a scale
    int whole, cuts, items;  // items: `whole` tiles, then those left in `cuts` pieces each
};

struct Memory {  // shared: where the first stage begins, and what goes with the stages
    u32 stages, slots, scales, full, empty, flags;
};

struct Item {
    int tile, first, end;  // its steps
    int left, part;        // which of the tiles that are in pieces, and which piece of it
    __device__ __forceinline__ int steps() const { return end - first; }
};

__device__ __forceinline__ Item item_of(const Problem& p, int i) {
    if (i < p.whole) return {i, 0, p.steps, 0, 0};
    const int left = (i - p.whole) / p.cuts, part = (i - p.whole) % p.cuts;
    return {p.whole + left, p.steps * part / p.cuts, p.steps * (part + 1) / p.cuts, left, part};
}

// ---- the left operand ----

struct Step {  // what a thread needs of a stage for it
    Words words[BLOCKS];
    u32 scale[BLOCKS][GROUPS][2];  // of rows g and g + 8, pairs
    Rest rest[BLOCKS][GROUPS];
};

struct Left {  // of one part
    u32 a[BLOCKS][CHUNKS][4];
};

__device__ __forceinline__ void read_step(Step& step, const Memory& m, u32 stage) {
    const u32 warp = threadIdx.x / 32 % 4, band = threadIdx.x / 128 * BLOCKS, line = threadIdx.x % 32 / 4;
    const u32 words = m.stages + stage * STAGE_BYTES + TOKEN_BYTES;
    const u32 scales = m.scales + stage * SCALE_BYTES + 2 * (64 * band + 16 * warp + line);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        const u32 block = (band + b) * 4 + warp;
        step.words[b] = read_words(words + block * BLOCK_BYTES, words + FIRST_BYTES + block * SECOND_BYTES);
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 at = scales + 2 * (g * ROWS + 64 * b + 8 * h);
                step.scale[b][g][h] = read2_twice(at);
#if ASYM
                step.rest[b][g].zero[h] = read2_twice(at + GRID_BYTES);
#endif
            }
    }
}

template <int chunk>
__device__ __forceinline__ void make(u32 (&a)[4], const Words& words, const Step& step, int b) {
    constexpr int group = chunk * GROUPS / 4;
    codes_of<chunk>(a, words, step.rest[b][group]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a[i] = multiply_pairs(a[i], step.scale[b][group][i % 2]);
        asm volatile("" : "+r"(a[i]));  // not after the fence that follows
    }
}

template <int part>
__device__ __forceinline__ void set_left(Left& left, Step& step) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        // Not before the wait that precedes: it would take registers for longer.
#pragma unroll
        for (int i = 0; i < WORDS_OF_LANE; i++) asm volatile("" : "+r"(step.words[b].w[i]));
        make<part * CHUNKS>(left.a[b][0], step.words[b], step, b);
        if constexpr (CHUNKS == 2) make<part * CHUNKS + CHUNKS - 1>(left.a[b][CHUNKS - 1], step.words[b], step, b);
    }
}

template <int part>
__device__ __forceinline__ void multiply(float (&sums)[BLOCKS][SUMS], const Left& left, u32 tokens) {
    const u64 right = operand<TOKEN_ROW>(tokens) + 2 * CHUNKS * part;  // 32 bytes a chunk
    products_fence();
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) weight_product(sums[b], left.a[b][c], right + 2 * c);
    products_commit();
}
