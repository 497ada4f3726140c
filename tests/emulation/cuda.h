// What CUDA C++ has beside C++, for a thread of `threads.h`.
#pragma once
#include "threads.h"

#include <cmath>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

#define threadIdx (emulated::here->thread)
#define blockIdx (emulated::here->block)
#define gridDim (emulated::machine.grid)

using std::max;
using std::min;

inline u32 __float_as_uint(float v) {
    u32 r;
    std::memcpy(&r, &v, 4);
    return r;
}
inline float __uint_as_float(u32 v) {
    float r;
    std::memcpy(&r, &v, 4);
    return r;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __int2float_rn(int v) { return (float)v; }

struct float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline void __stcg(float4* at, float4 v) {
    emulated::let_others_run();
    *at = v;
}
inline float4 __ldcg(const float4* at) {
    emulated::let_others_run();
    return *at;
}

inline int atomicAdd(int* at, int v) {
    emulated::let_others_run();
    const int before = *at;
    *at += v;
    return before;
}

inline void __syncwarp() { emulated::here->warp().together("__syncwarp"); }
inline void __syncthreads() { emulated::here->in->all.together("__syncthreads"); }

template <class T>
T __shfl_sync(u32, T v, int from) {
    return emulated::here->warp().exchange("__shfl_sync", emulated::here->lane(), v)[from % 32];
}
template <class T>
T __shfl_xor_sync(u32, T v, int with) {
    const int lane = emulated::here->lane();
    return emulated::here->warp().exchange("__shfl_xor_sync", lane, v)[lane ^ with];
}

template <class T>
T __shfl_up_sync(u32, T v, int by) {
    const int lane = emulated::here->lane();
    const T* all = emulated::here->warp().exchange("__shfl_up_sync", lane, v);
    return lane >= by ? all[lane - by] : v;
}
