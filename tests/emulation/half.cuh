// 16-bit floats of the kernels' own half.cuh: in double, which is exact for what kernels give it, then rounded once.
#pragma once
#include "hopper.cuh"

inline float number_of(u32 bits) {
#if FLOAT16
    const u16 low = (u16)bits;
    _Float16 h;
    std::memcpy(&h, &low, 2);
    return (float)h;
#else
    return __uint_as_float(bits << 16);
#endif
}

inline u16 rounded_from(double v) {
#if FLOAT16
    const _Float16 h = (_Float16)v;
    u16 r;
    std::memcpy(&r, &h, 2);
    return r;
#else
    // To odd into 32 bits first, so that rounding again to 16 is right.
    float f = (float)v;
    u32 bits = __float_as_uint(f);
    if (f != f) return 0x7fff;
    if ((double)f != v && !(bits & 1)) {
        const bool up = (double)f > v, negative = bits >> 31;
        bits += up == negative ? 1 : -1;
    }
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

inline u16 rounded(float v) { return rounded_from(v); }
inline u32 rounded(float low, float high) { return rounded(low) | (u32)rounded(high) << 16; }

inline u32 pair_of(float v) { return rounded(v, v); }

template <class F>
u32 in_pairs(F f) {
    return rounded_from(f(0)) | (u32)rounded_from(f(16)) << 16;
}
inline u32 add_pairs(u32 a, u32 b) {
    return in_pairs([=](int s) { return (double)number_of(a >> s & 0xffff) + number_of(b >> s & 0xffff); });
}
inline u32 subtract_pairs(u32 a, u32 b) {
    return in_pairs([=](int s) { return (double)number_of(a >> s & 0xffff) - number_of(b >> s & 0xffff); });
}
inline u32 multiply_pairs(u32 a, u32 b) {
    return in_pairs([=](int s) { return (double)number_of(a >> s & 0xffff) * number_of(b >> s & 0xffff); });
}
inline u32 multiply_add_pairs(u32 a, u32 b, u32 c) {
    return in_pairs([=](int s) {
        return (double)number_of(a >> s & 0xffff) * number_of(b >> s & 0xffff) + number_of(c >> s & 0xffff);
    });
}
