// Which tokens meet which weight, of `few_tokens.cu`: token tiles of a stack of experts, or the only one there is.
#pragma once
#include "few_tile.cuh"

struct Slot {  // tokens that meet one weight
    int expert, first, end;
};

__device__ __forceinline__ Slot slot_at(const Slot* slots, const Problem& p, int slot) {
#if EXPERTS
    return slots[min(slot, MOST_SLOTS - 1)];
#else
    return {0, 0, p.M};
#endif
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
