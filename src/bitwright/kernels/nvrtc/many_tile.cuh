// Steps of `many_tokens.cu`: what a stage holds, and how it becomes left operands.
#pragma once
#include "codes.cuh"
#include "instructions.cuh"
#include "results.cuh"

constexpr int PARTS = SPAN * 4 / CHUNKS;                               // of a step, products of CHUNKS * 16 columns
constexpr int GROUPS = GROUP < 64 * SPAN ? 64 * SPAN / GROUP : 1;      // scales of a row in a step
constexpr int GROUPS_OF_BLOCK = GROUPS > SPAN ? GROUPS / SPAN : 1;     // in a column block
constexpr int BANDS = ROWS / 64;                                       // of a tile
constexpr int TOKEN_ROW = 128, TOKEN_BLOCK = TOKENS * TOKEN_ROW, TOKEN_BYTES = SPAN * TOKEN_BLOCK;
constexpr int BAND_BYTES = 4 * BLOCK_BYTES, SECOND_BAND_BYTES = 4 * SECOND_BYTES;  // of one column block
constexpr int FIRST_BYTES = BANDS * SPAN * BAND_BYTES, WORD_BYTES = FIRST_BYTES + BANDS * SPAN * SECOND_BAND_BYTES;
constexpr int STAGE_BYTES = TOKEN_BYTES + WORD_BYTES;
constexpr int GRID_BYTES = 2 * GROUPS * ROWS, SCALE_BYTES = (1 + ASYM) * GRID_BYTES;  // scales, then zero points
static_assert(GROUP < 64 * SPAN ? GROUPS * GROUP == 64 * SPAN : GROUP % (64 * SPAN) == 0, "a step cuts no group");
static_assert(PARTS % 2 == 0, "every step begins with the same one of two left operands");
static_assert(STAGE_BYTES % 1024 == 0 && GRID_BYTES % 128 == 0, "TMA and its swizzle want aligned boxes");

struct Problem {
    int M, N;
    int bands, columns;      // of the weight, in blocks
    int steps, group_steps;  // of a tile, of a scale
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

struct Step {  // what a thread needs of a column block for it
    Words words[BLOCKS];
    u32 scale[BLOCKS][GROUPS_OF_BLOCK][2];  // of rows g and g + 8, pairs
    Rest rest[BLOCKS][GROUPS_OF_BLOCK];
};

struct Left {  // of one part
    u32 a[BLOCKS][CHUNKS][4];
};

// Where a thread reads in the first stage: found once, and held.
struct Own {
    u32 words, second, scales;
};

__device__ __forceinline__ Own own_of(const Memory& m) {
    const u32 warp = threadIdx.x / 32 % 4, band = threadIdx.x / 128 * BLOCKS, lane = threadIdx.x % 32;
    const u32 block = band * SPAN * 4 + warp, words = m.stages + TOKEN_BYTES;
    Own own = {words + block * BLOCK_BYTES + lane * LANE_BYTES, words + FIRST_BYTES + block * SECOND_BYTES + lane * 4,
               m.scales + 2 * (64 * band + 16 * warp + lane / 4)};
    asm volatile("" : "+r"(own.words), "+r"(own.second), "+r"(own.scales));
    return own;
}

// Column block `block` of the stage. Scales of a group that began in the block before are there already.
template <int block>
__device__ __forceinline__ void read_block(Step& step, const Own& own, u32 stage) {
    const u32 words = own.words + stage * STAGE_BYTES, second = own.second + stage * STAGE_BYTES;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        const u32 at = b * SPAN * 4 + block * 4;
        step.words[b] = read_words(words + at * BLOCK_BYTES, second + at * SECOND_BYTES);
    }
    if constexpr (block * GROUPS % SPAN == 0) {
        const u32 scales = own.scales + stage * SCALE_BYTES + 2 * (block * GROUPS / SPAN) * ROWS;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
            for (int g = 0; g < GROUPS_OF_BLOCK; g++)
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
    constexpr int group = chunk * GROUPS_OF_BLOCK / 4;
    codes_of<chunk>(a, words, step.rest[b][group]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a[i] = multiply_pairs(a[i], step.scale[b][group][i % 2]);
        asm volatile("" : "+r"(a[i]));  // not after the fence that follows
    }
}

template <int chunk, int c = 0>
__device__ __forceinline__ void make_chunks(Left& left, const Step& step, int b) {
    make<chunk + c>(left.a[b][c], step.words[b], step, b);
    if constexpr (c + 1 < CHUNKS) make_chunks<chunk, c + 1>(left, step, b);
}

template <int part>
__device__ __forceinline__ void set_left(Left& left, Step& step) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        // Not before the wait that precedes: it would take registers for longer.
#pragma unroll
        for (int i = 0; i < WORDS_OF_LANE; i++) asm volatile("" : "+r"(step.words[b].w[i]));
        make_chunks<part * CHUNKS % 4>(left, step, b);
    }
}

// tokens: low word of the operand that a stage's tokens are.
template <int part>
__device__ __forceinline__ void multiply(float (&sums)[BLOCKS][SUMS], const Left& left, u32 tokens) {
    constexpr int block = part * CHUNKS / 4, chunk = part * CHUNKS % 4;
    const u32 right = tokens + block * TOKEN_BLOCK / 16 + 2 * chunk;  // 32 bytes a chunk
    products_fence();
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) weight_product(sums[b], left.a[b][c], right + 2 * c);
    products_commit();
}
