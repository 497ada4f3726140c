// Tiles of ROWS outputs x TOKENS tokens, the stages that bring their operands, and clusters whose blocks have the same
// tokens: what kernels share that have two warpgroups that multiply, each half the rows.
//
// Macros: ROWS (128 or 256), TOKENS, STAGES (at least 2), CLUSTER (blocks), BAND token tiles.
#pragma once
#include "ring.cuh"

constexpr int WARPGROUPS = 2;
constexpr int BLOCKS = ROWS / 128;  // of 64 rows, that a warpgroup multiplies
constexpr int SUMS = TOKENS / 2;    // registers of a thread for 64 rows
static_assert(STAGES >= 2, "a step is given back when the next one is under way");
static_assert(TOKENS % (8 * CLUSTER) == 0, "what a block brings begins where the swizzle does");

struct Place {
    int token, row;  // the first of a tile
};

__device__ __forceinline__ int tiles_of(int M, int N) {  // of clusters
    return (M + TOKENS - 1) / TOKENS * ((N + ROWS * CLUSTER - 1) / (ROWS * CLUSTER));
}

// Bands of BAND token tiles, so that what is read twice is still in L2.
__device__ __forceinline__ Place place(int M, int N, int tile, u32 rank) {
    const int nm = (M + TOKENS - 1) / TOKENS, nn = (N + ROWS * CLUSTER - 1) / (ROWS * CLUSTER);
    const int band = tile / (BAND * nn), rows = min(nm - band * BAND, BAND), inside = tile - band * BAND * nn;
    return {(band * BAND + inside % rows) * TOKENS, (inside / rows * CLUSTER + (int)rank) * ROWS};
}

// TOKENS rows of `row_bytes` from `column` on; in a cluster every block brings its share to all.
__device__ __forceinline__ void bring_tokens(u32 to, const TensorMap& map, u32 full, int column, int token, u32 rank,
                                             u32 row_bytes) {
    if (CLUSTER == 1) {
        bring(to, map, full, column, token);
    } else {
        const u32 first = rank * (TOKENS / CLUSTER);
        bring_all(to + first * row_bytes, map, full, column, token + (int)first, (u16)((1 << CLUSTER) - 1));
    }
}

// A warp has read all that it wants of a stage.
__device__ __forceinline__ void give_back(u32 empty, u32 stage) {
    __syncwarp();
    if (threadIdx.x % 32 < CLUSTER) barrier_arrive(empty + 8 * stage, threadIdx.x % 32);
}

// Barriers of all stages, before any thread uses one: full by the `bringing` warps, empty by every warp that multiplies
// it, in all blocks of the cluster.
__device__ __forceinline__ void init_stages(u32 full, u32 empty, u32 bringing) {
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, bringing);
            barrier_init(empty + 8 * s, 4 * WARPGROUPS * CLUSTER);
        }
        barriers_ready();
    }
    // No block may be written to before its barriers are there, nor after it is gone.
    if (CLUSTER > 1) cluster_sync_barriers();
    __syncthreads();
}
