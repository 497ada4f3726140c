// Packed weights times at most TOKENS tokens: the kernel for decoding, which is bound by reading the weight.
//
// One warp brings stages by TMA: STEP columns of ROWS rows, their scales, and the same columns of the tokens. Each of the
// other warps multiplies 16 rows of every stage, with the weight as the left operand of mma.m16n8k16, made in registers
// from the words (`codes.cuh`); scales are multiplied onto the sums of a group. Warps wait for stages, and for each other
// at the end of a tile only, where teams add up what they have of it.
//
// The tiles' steps are numbered through and cut into equal runs, one a block ("stream-K", Osama et al., 2023). Blocks
// that share a tile add their sums up in pairs: an exchange with memory leaves a sum, or finds the other one, and whoever
// finds it goes on with both, up a binary tree. So the order of additions is always the same, nobody waits, and nothing
// is there to be made visible, since what is exchanged is the number itself.
//
// With programmatic dependent launch a block of the next launch begins where one of this has ended, and its first stages
// of weights, which no kernel writes, arrive while the last blocks of this launch run and whatever stands between the two.
//
// Macros: BITS, FLOAT16, ASYM (see `codes.cuh`), BIAS (0 or 1), GROUP (columns of a scale, a divisor or a multiple of a
// step; 0: a row), TOKENS (8 or 16), WARPS that multiply, in TEAMS (1 or 2) that share the columns of a step, COLUMNS
// (column blocks of 64 a step), STAGES, EXPERTS (0: one weight; 1: a stack with sorted rows), SETTLED (see
// `ops.fragment_experts`), MOST_SLOTS (token tiles of all experts).
#include "few_slots.cuh"
#include "few_sums.cuh"

struct Operands {
    const unsigned char *words, *second;
};

// ---- the warp that brings stages (one thread of it) ----

struct Maps {
    const TensorMap &tokens, &scale, &zero;
};

// Where a step stands: counted on, since divisions would keep the one thread that brings stages from being ahead.
struct Cursor {
    int step, tile;       // the tile along N
    int slot;             // of tokens
    Slot at;
    int unit;
};

__device__ __forceinline__ Cursor cursor_at(const Slot* slots, const Problem& p, int unit) {
    Cursor c;
    const int tile = unit / p.steps;
    c.unit = unit, c.step = unit - tile * p.steps, c.slot = tile / p.tiles, c.tile = tile - c.slot * p.tiles;
    c.at = slot_at(slots, p, c.slot);
    return c;
}

__device__ __forceinline__ void next(Cursor& c, const Slot* slots, const Problem& p) {
    c.unit++;
    if (++c.step == p.steps) {
        c.step = 0;
        if (++c.tile == p.tiles) {
            c.tile = 0, c.slot++;
            c.at = slot_at(slots, p, c.slot);
        }
    }
}

__device__ __forceinline__ void bring_weights(const Maps& maps, const Operands& o, const Problem& p, u32 stage, u32 full,
                                              const Cursor& c) {
    const int column = c.step * COLUMNS, columns = min(COLUMNS, p.columns - column);
    const u32 bytes = columns * BAND_BYTES, second_bytes = columns * SECOND_BAND_BYTES;
    barrier_expect(full, TOKEN_BYTES + BANDS * (bytes + second_bytes) + (ASYM ? 2 : 1) * SCALE_BYTES);
#pragma unroll
    for (int b = 0; b < BANDS; b++) {
        // Rows past the end are not written: any words will do for them.
        const int band = c.at.expert * p.bands + min(c.tile * BANDS + b, p.bands - 1);
        const u64 at = (u64)band * p.columns + column;
        bring_run(stage + TOKEN_BYTES + b * (COLUMNS * BAND_BYTES), o.words + at * BAND_BYTES, bytes, full);
#if BITS == 3
        bring_run(stage + SECOND_AT + b * (COLUMNS * SECOND_BAND_BYTES), o.second + at * SECOND_BAND_BYTES,
                  second_bytes, full);
#endif
    }
    const int group = c.at.expert * p.groups + (GROUP == 0 ? 0 : GROUP <= STEP ? c.step * GROUPS : c.step * STEP / GROUP);
    bring(stage + SCALE_AT, maps.scale, full, c.tile * ROWS, group);
#if ASYM
    bring(stage + ZERO_AT, maps.zero, full, c.tile * ROWS, group);
#endif
}

__device__ __forceinline__ void produce(const Maps& maps, const Operands& o, const Slot* slots, const Problem& p,
                                        u32 stages, u32 full, u32 empty, int first, int last) {
    // The first stages: weights before the wait for the launches before this one, tokens after it.
    const int ahead = min(first + STAGES, last);
    Cursor weights = cursor_at(slots, p, first), tokens = weights;
    for (int s = 0; weights.unit < ahead; s++, next(weights, slots, p))
        bring_weights(maps, o, p, stages + s * STAGE_BYTES, full + 8 * s, weights);
    // The other warps do not wait: what they touch in memory follows a stage that is full, which none is before its
    // tokens came. A block without work waits all the same, since the next launch counts on it.
    wait_for_launches();
    allow_launch();
    Ring ring;
    for (; tokens.unit < last; ring.next(), next(tokens, slots, p)) {
        const u32 barrier = full + 8 * ring.stage, stage = stages + ring.stage * STAGE_BYTES;
        if (tokens.unit >= ahead) {
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            bring_weights(maps, o, p, stage, barrier, tokens);
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
            bring(stage + c * (TOKENS * 128), maps.tokens, barrier, tokens.step * STEP + 64 * c, tokens.at.first);
    }
}

// ---- the warps that multiply ----

// Scales and zero points of a group for the rows of this thread.
struct Grid {
    float scale[2];
    Rest rest;
};

__device__ __forceinline__ void read_grid(Grid& grid, u32 stage, int group, int row) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 at = 2 * (group * ROWS + row + 8 * h);
        grid.scale[h] = number_of(read2(stage + SCALE_AT + at));
#if ASYM
        grid.rest.zero[h] = read2_twice(stage + ZERO_AT + at);
#endif
    }
}

// One step: sums += the products of its groups, each times its scales.
__device__ __forceinline__ void add_step(float (&sums)[SUMS], u32 stage) {
    const int warp = threadIdx.x / 32 % TEAM, team = threadIdx.x / 32 / TEAM, lane = threadIdx.x % 32;
    const int row = 16 * warp + lane / 4;
    const float nothing[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float part[2][EIGHTS][4];  // two sums, since a product waits for the one before it
    Grid grid;
#pragma unroll
    for (int share = 0; share < SHARE; share++) {
        const int c = team * SHARE + share, at = warp / 4 * (4 * COLUMNS) + 4 * c + warp % 4;
        const Words words =
            read_words(stage + TOKEN_BYTES + at * BLOCK_BYTES + lane * LANE_BYTES, stage + SECOND_AT + at * SECOND_BYTES + lane * 4);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // What a team takes begins with a group, or lies in one.
            const int column = 64 * share + 32 * half;
            const bool begins = column % WIDTH == 0, ends = (column + 32) % min(WIDTH, 64 * SHARE) == 0;
            if (begins) read_grid(grid, stage, (64 * SHARE * team + column) / WIDTH, row);
            u32 low[4], high[4];
            if (half == 0) {
                codes_of<0>(low, words, grid.rest);
                codes_of<1>(high, words, grid.rest);
            } else {
                codes_of<2>(low, words, grid.rest);
                codes_of<3>(high, words, grid.rest);
            }
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                // 8 tokens are 1024 bytes, in which 16 bytes of a token stand where the swizzle puts them.
                u32 right[4];
                read_matrices(right, stage + (c * EIGHTS + e) * 1024 + lane % 8 * 128 +
                                         ((4 * half + lane / 8) ^ lane % 8) * 16);
                if (begins) {
                    product(part[0][e], low, right[0], right[1], nothing);
                    product(part[1][e], high, right[2], right[3], nothing);
                } else {
                    product(part[0][e], low, right[0], right[1], part[0][e]);
                    product(part[1][e], high, right[2], right[3], part[1][e]);
                }
                if (!ends) continue;
#pragma unroll
                for (int i = 0; i < 4; i++) sums[4 * e + i] += (part[0][e][i] + part[1][e][i]) * grid.scale[i / 2];
            }
        }
    }
}

__device__ __forceinline__ void consume(u16* out, const u16* bias, Four* exchange, const Slot* slots, const Problem& p,
                                        u32 stages, u32 full, u32 empty, u32 given, int first, int last) {
    Ring ring;
    for (int unit = first, piece = 0; unit < last; piece++) {
        const int tile = unit / p.steps, begin = tile * p.steps, end = min(begin + p.steps, last);
        const bool complete = unit == begin && end == begin + p.steps;
        float sums[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;
        for (; unit < end; unit++, ring.next()) {
            barrier_wait(full + 8 * ring.stage, ring.parity);
            add_step(sums, stages + ring.stage * STAGE_BYTES);
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * ring.stage);
        }
        if (TEAMS > 1) {
            gather(sums, given, piece);
            if (threadIdx.x >= 32 * TEAM) continue;
        }
        const int slot = tile / p.tiles, row = (tile - slot * p.tiles) * ROWS;
        const Slot at = slot_at(slots, p, slot);
        bool whole[EIGHTS];
#pragma unroll
        for (int f = 0; f < EIGHTS; f++) whole[f] = at.first + token_of(4 * f) < at.end && row + row_of(4 * f) < p.N;
        if (!complete) {
            const int from = begin / p.per, to = (begin + p.steps - 1) / p.per;
            settle(sums, whole, exchange, blockIdx.x - from, to - from + 1, from);
        }
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const int n = row + row_of(i), m = at.first + token_of(i);
            if (!whole[i / 4] || n >= p.N || m >= at.end) continue;
#if BIAS
            sums[i] = __fadd_rn(sums[i], number_of(bias[n]));
#endif
            out[(u64)m * p.N + n] = rounded(sums[i]);
        }
    }
}

// out [M, N] = x Wᵀ + bias, of M tokens at most TOKENS; of a stack, rows offsets[e] ... offsets[e + 1] - 1 of x meet
// weight e. exchange: zeros, left zero, ROWS * TOKENS for every block.
extern "C" __global__ void __launch_bounds__(32 * WARPS + 32, 1)
    few_tokens(const __grid_constant__ TensorMap tokens, const __grid_constant__ TensorMap scale,
               const __grid_constant__ TensorMap zero, const unsigned char* words, const unsigned char* second, u16* out,
               const u16* bias, Four* exchange, const int* offsets, int experts, int M, int N, int bands,
               int columns, int groups, int per) {
    extern __shared__ unsigned char memory[];
#if EXPERTS
    __shared__ int found;
#endif
    const u32 stages = (shared_address(memory) + 1023) & ~1023u, full = stages + STAGES * STAGE_BYTES;
    const u32 empty = full + 8 * STAGES;
    const u32 given = empty + 8 * STAGES;
    const bool brings = warp_number() == WARPS;
    if (brings) {
        if (elected()) {
            fetch_map(scale);
            fetch_map(tokens);
            for (int s = 0; s < STAGES; s++) {
                barrier_init(full + 8 * s, 1);
                barrier_init(empty + 8 * s, WARPS);
            }
            barriers_ready();
        }
        __syncwarp();
    }
    Problem p = {M, N, bands, columns, groups, (N + ROWS - 1) / ROWS, (columns + COLUMNS - 1) / COLUMNS, per};
    int tiles = p.tiles;
    const Slot* slots = nullptr;
#if EXPERTS
    slots = (Slot*)(memory + (given + GIVEN_BYTES - shared_address(memory)));
    if (threadIdx.x / 32 == 0) {
        if (!SETTLED) wait_for_launches();  // which tiles there are is the result of an earlier kernel
        const int many = find_slots((Slot*)slots, offsets, experts);
        if (threadIdx.x == 0) found = many;
    }
    __syncthreads();
    tiles *= found;
    p.per = max((tiles * p.steps + (int)gridDim.x - 1) / (int)gridDim.x, 1);
#endif
    const int first = min((int)blockIdx.x * p.per, tiles * p.steps), last = min(first + p.per, tiles * p.steps);
    // Whoever brings stages does not wait for those who need them.
    if (brings) {
        named_arrive(2, 32 * WARPS + 32);
        if (elected())
            produce({tokens, scale, zero}, {words, second}, slots, p, stages, full, empty, first, last);
    } else {
        named_sync(2, 32 * WARPS + 32);
        consume(out, bias, exchange, slots, p, stages, full, empty, given, first, last);
    }
}
