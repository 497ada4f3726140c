// 16-bit floats, bf16 or fp16 by the macro FLOAT16, as bits: conversions, and arithmetic on pairs of them.
#pragma once
#include "hopper.cuh"

__device__ __forceinline__ float number_of(u32 bits) {
#if FLOAT16
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((u16)bits));
    return r;
#else
    return __uint_as_float(bits << 16);
#endif
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

__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 r;
#if FLOAT16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}

// ---- arithmetic on pairs of 16-bit floats ----

__device__ __forceinline__ u32 pair_of(float v) { return rounded(v, v); }  // exact numbers only

#if FLOAT16
#define PAIRS "f16x2"
#else
#define PAIRS "bf16x2"
#endif

__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
    u32 r;
    asm("add.rn." PAIRS " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ __forceinline__ u32 subtract_pairs(u32 a, u32 b) {
    u32 r;
    asm("sub.rn." PAIRS " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
    u32 r;
    asm("mul.rn." PAIRS " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ __forceinline__ u32 multiply_add_pairs(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn." PAIRS " %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
