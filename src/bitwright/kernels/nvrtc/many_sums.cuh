// Adding up the pieces of a tile of `many_tokens.cu`, always in the same order.
#pragma once
#include "many_tile.cuh"

// Leave the sums of a piece in `partial`; the warpgroup that comes last with a piece of its rows adds all of them up, in
// the order of their columns, and goes on. Nobody waits for anybody, so blocks may run in any order and beside other
// launches.
__device__ __forceinline__ bool settle(float (&sums)[BLOCKS][SUMS], float* partial, int* counters, const Memory& m,
                                       const Problem& p, const Item& item, u32 rank) {
    const u32 group = threadIdx.x / 128, thread = threadIdx.x % 128, flag = m.flags + 4 * group;
    constexpr u64 SIZE = ROWS / WARPGROUPS * TOKENS;  // 16 bytes of every thread side by side
    const u64 between = (u64)CLUSTER * WARPGROUPS * SIZE;
    float* first = partial + (u64)item.left * p.cuts * between + (rank * WARPGROUPS + group) * SIZE + 4 * thread;
    float4* own = (float4*)(first + item.part * between);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) {
            __stcg(own + (b * SUMS + i) / 4 * 128,
                   make_float4(sums[b][i], sums[b][i + 1], sums[b][i + 2], sums[b][i + 3]));
        }
    fence_gpu();
    named_sync(1 + group, 128);
    if (thread == 0) {
        int* counter = counters + (item.left * CLUSTER + (int)rank) * WARPGROUPS + group;
        const bool last = atomicAdd(counter, 1) == p.cuts - 1;
        if (last) *counter = 0;
        write4(flag, last);
    }
    named_sync(1 + group, 128);
    if (read4(flag) == 0) return false;
    fence_gpu();
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) sums[b][i] = 0.0f;
    for (int part = 0; part < p.cuts; part++) {
        const float4* piece = (const float4*)(first + part * between);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
            for (int i = 0; i < SUMS; i += 4) {
                const float4 v = __ldcg(piece + (b * SUMS + i) / 4 * 128);
                sums[b][i] += v.x, sums[b][i + 1] += v.y, sums[b][i + 2] += v.z, sums[b][i + 3] += v.w;
            }
    }
    return true;
}
