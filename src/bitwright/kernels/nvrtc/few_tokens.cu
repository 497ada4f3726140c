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
#include "codes.cuh"

constexpr int STEP = 64 * COLUMNS, TEAM = WARPS / TEAMS, ROWS = 16 * TEAM, BANDS = ROWS / 64;
constexpr int SHARE = COLUMNS / TEAMS;  // column blocks of a step that a team takes
constexpr int GROUPS = GROUP == 0 || GROUP >= STEP ? 1 : STEP / GROUP, WIDTH = STEP / GROUPS;
constexpr int EIGHTS = TOKENS / 8;
constexpr int TOKEN_BYTES = COLUMNS * TOKENS * 128;  // 64 columns of all tokens, then the next 64
constexpr int BAND_BYTES = 4 * BLOCK_BYTES, SECOND_BAND_BYTES = 4 * SECOND_BYTES;  // of one column block
constexpr int WORD_BYTES = BANDS * COLUMNS * BAND_BYTES, SECOND_WORD_BYTES = BANDS * COLUMNS * SECOND_BAND_BYTES;
constexpr int SCALE_BYTES = GROUPS * ROWS * 2;
constexpr int SECOND_AT = TOKEN_BYTES + WORD_BYTES, SCALE_AT = SECOND_AT + SECOND_WORD_BYTES;
constexpr int ZERO_AT = SCALE_AT + SCALE_BYTES;
constexpr int STAGE_BYTES = (ZERO_AT + (ASYM ? SCALE_BYTES : 0) + 1023) / 1024 * 1024;
constexpr int SUMS = 4 * EIGHTS;  // of a thread, four for 8 tokens
static_assert(ROWS % 64 == 0 && ROWS <= 256 && (GROUP < STEP ? WIDTH * GROUPS == STEP : GROUP % STEP == 0), "");
static_assert(64 * SHARE % WIDTH == 0 || WIDTH % (64 * SHARE) == 0, "");
constexpr int GIVEN_BYTES = TEAMS > 1 ? 2 * (TEAMS - 1) * ROWS * TOKENS * 4 : 0;  // sums that teams hand over

struct Problem {
    int M, N, bands, columns, groups;  // bands and column blocks of a weight, rows of its scales
    int tiles, steps, per;                // tiles along N, steps of a tile, steps of a run
};

struct Operands {
    const unsigned char *words, *second;
    const int* offsets;
};

struct Slot {  // tokens that meet one weight
    int expert, first, end;
};

struct Ring {  // the stages in turn
    u32 stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

__device__ __forceinline__ Slot slot_at(const Slot* slots, const Problem& p, int slot) {
#if EXPERTS
    return slots[min(slot, MOST_SLOTS - 1)];
#else
    return {0, 0, p.M};
#endif
}

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

// Two or four 8 x 8 matrices of 16 bits; the lane gives the address of row lane % 8 of matrix lane / 8.
__device__ __forceinline__ void read_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d = a b + c, 16 rows x 16 columns by 8 tokens.
__device__ __forceinline__ void product(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
#if FLOAT16
#define PRODUCT "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define PRODUCT "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
    asm volatile(PRODUCT " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
}

__device__ __forceinline__ float number_of(u32 bits) {
#if FLOAT16
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((u16)bits));
    return r;
#else
    return __uint_as_float(bits << 16);
#endif
}

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
            read_words(stage + TOKEN_BYTES + at * BLOCK_BYTES, stage + SECOND_AT + at * SECOND_BYTES);
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

// Number i of a thread's sums: its token and its row in the tile.
__device__ __forceinline__ int token_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

__device__ __forceinline__ int row_of(int i) {
    return threadIdx.x / 32 % TEAM * 16 + threadIdx.x % 32 / 4 + i % 4 / 2 * 8;
}

struct alignas(16) Four {
    u32 v[4];
};

// Leaves four numbers in memory and takes what was there, in one go.
__device__ __forceinline__ Four exchanged(Four* at, const Four& x) {
    Four r;
    asm volatile(
        "{ .reg .b128 given, found; .reg .b64 low, high;\n"
        "mov.b64 low, {%4, %5}; mov.b64 high, {%6, %7}; mov.b128 given, {low, high};\n"
        "atom.global.exch.b128 found, [%8], given;\n"
        "mov.b128 {low, high}, found; mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high; }"
        : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
        : "r"(x.v[0]), "r"(x.v[1]), "r"(x.v[2]), "r"(x.v[3]), "l"(at)
        : "memory");
    return r;
}

// Piece `piece` of `pieces` of a tile, of which boundaries first, first + 1, ... lie between its blocks: adds what others
// left of the sums, or leaves them. `whole` says which fours are complete in the end; the others need not be looked at.
__device__ __forceinline__ void settle(float (&sums)[SUMS], bool (&whole)[EIGHTS], Four* exchange, int piece, int pieces,
                                       int first) {
    for (int width = 1; width < pieces; width *= 2) {  // pieces in one place of the tree
        const int place = piece / width;
        if ((place ^ 1) * width >= pieces) continue;  // alone: goes on to the next level
        const int boundary = first + (place | 1) * width - 1;
        Four* at = exchange + (u64)boundary * (ROWS * TOKENS / 4) + threadIdx.x / 32 * (32 * EIGHTS) + threadIdx.x % 32;
        Four found[EIGHTS];
#pragma unroll
        for (int f = 0; f < EIGHTS; f++) {
            // Memory is 0 where nothing was left, so a sum of 0 is left as -0, which changes no sum.
            Four given;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 bits = __float_as_uint(sums[4 * f + i]);
                given.v[i] = bits == 0 ? 0x80000000u : bits;
            }
            if (whole[f]) found[f] = exchanged(at + 32 * f, given);
        }
#pragma unroll
        for (int f = 0; f < EIGHTS; f++) {
            if (!whole[f]) continue;
            whole[f] = found[f].v[0] != 0;
            if (whole[f]) {
                at[32 * f] = {0, 0, 0, 0};  // as it was found, for the next launch
#pragma unroll
                for (int i = 0; i < 4; i++) sums[4 * f + i] += __uint_as_float(found[f].v[i]);
            }
        }
    }
}

// The sums of all teams, for the first one; a piece takes one of two places in turn.
__device__ __forceinline__ void gather(float (&sums)[SUMS], u32 given, int piece) {
    const int team = threadIdx.x / 32 / TEAM;
    const u32 place = given + piece % 2 * (GIVEN_BYTES / 2) + threadIdx.x % (32 * TEAM) * 16;
#pragma unroll
    for (int f = 0; f < EIGHTS; f++)
        if (team > 0)
            write16(place + ((team - 1) * EIGHTS + f) * (TEAM * 512), sums[4 * f], sums[4 * f + 1], sums[4 * f + 2],
                    sums[4 * f + 3]);
    named_sync(1, 32 * WARPS);
    if (team > 0) return;
#pragma unroll
    for (int other = 0; other < TEAMS - 1; other++)
#pragma unroll
        for (int f = 0; f < EIGHTS; f++) {
            const Words4 v = read16(place + (other * EIGHTS + f) * (TEAM * 512));
#pragma unroll
            for (int i = 0; i < 4; i++) sums[4 * f + i] += __uint_as_float(v.w[i]);
        }
}

__device__ __forceinline__ u16 rounded(float v) {
    u16 r;
#if FLOAT16
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
#endif
    return r;
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

#if EXPERTS
// Token tiles of all experts, in order; gives how many there are. By one warp.
__device__ __forceinline__ int find_slots(Slot* slots, const int* offsets, int experts) {
    const int lane = threadIdx.x % 32;
    int before = 0;
    for (int e = 0; e < experts; e += 32) {
        const bool there = e + lane < experts;
        const int first = there ? offsets[e + lane] : 0, end = there ? offsets[e + lane + 1] : 0;
        const int tiles = (end - first + TOKENS - 1) / TOKENS;
        int upto = tiles;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, upto, d);
            if (lane >= d) upto += other;
        }
        for (int t = 0; t < tiles; t++)
            slots[before + upto - tiles + t] = {e + lane, first + t * TOKENS, end};
        before += __shfl_sync(0xffffffffu, upto, 31);
    }
    return before;
}
#endif

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
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            fence_async();
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
            produce({tokens, scale, zero}, {words, second, offsets}, slots, p, stages, full, empty, first, last);
    } else {
        named_sync(2, 32 * WARPS + 32);
        consume(out, bias, exchange, slots, p, stages, full, empty, given, first, last);
    }
}
