// Adding up what teams and blocks have of a tile of `few_tokens.cu`, always in the same order.
#pragma once
#include "few_tile.cuh"

// Number i of a thread's sums: its token and its row in the tile.
__device__ __forceinline__ int token_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

__device__ __forceinline__ int row_of(int i) {
    return threadIdx.x / 32 % TEAM * 16 + threadIdx.x % 32 / 4 + i % 4 / 2 * 8;
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
