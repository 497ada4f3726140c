// Words of packed codes (`kernels.fragments`) to left operands of tensor cores: pairs of 16-bit floats, exactly.
//
// A field of a word is merged into the mantissa of a 16-bit float by one logic operation (2^7 + u in bf16, 2^10 + u in
// fp16); then the offset and the zero point are taken off together, which is exact: zero points are whole numbers in the
// range of the codes. What is left is code - zero point; scales are the kernel's business.
//
// Macros: BITS of a code (2, 3, 4 or 8), FLOAT16 (0: bfloat16), ASYM (with zero points).
#pragma once
#include "half.cuh"

constexpr int WORDS_OF_LANE = BITS;  // of a block of 16 rows x 64 columns
constexpr int BLOCK_BYTES = BITS == 3 ? 256 : 128 * BITS, SECOND_BYTES = BITS == 3 ? 128 : 0;  // of both tensors of words
constexpr u32 MAGIC = FLOAT16 ? 0x64006400u : 0x43004300u;
constexpr float MAGIC_VALUE = FLOAT16 ? 1024.0f : 128.0f;

__device__ __forceinline__ u32 merged(u32 word, u32 mask) { return and_or<MAGIC>(word, mask); }

// ---- words ----

constexpr int LANE_BYTES = BITS == 4 || BITS == 8 ? 16 : 8;

struct Words {  // of a lane, of one block
    u32 w[WORDS_OF_LANE];
};

// first, second: addresses of the lane's words in shared memory (the second of 3 bits only).
__device__ __forceinline__ Words read_words(u32 first, u32 second) {
    Words r;
#if BITS == 4
    const Words4 a = read16(first);
#pragma unroll
    for (int i = 0; i < 4; i++) r.w[i] = a.w[i];
#elif BITS == 8
    const Words4 a = read16(first), b = read16(first + 512);
#pragma unroll
    for (int i = 0; i < 4; i++) r.w[i] = a.w[i], r.w[4 + i] = b.w[i];
#else
    const Words2 a = read8(first);
    r.w[0] = a.w[0], r.w[1] = a.w[1];
#if BITS == 3
    r.w[2] = read4(second);
#endif
#endif
    return r;
}

// ---- from words to codes ----

// What is added to a pair to center it, for a field that stands 2^up too high; of rows g and g + 8. Without zero points
// it is a constant.
struct Rest {
#if ASYM
    u32 zero[2];  // pairs
#endif
    __device__ __forceinline__ u32 of(float number, int row) const {
#if ASYM
        return subtract_pairs(pair_of(number), zero[row]);
#else
        return pair_of(number);
#endif
    }
};

// The left operand of a product of 16 columns, chunk 0 to 3 of a block: registers as wgmma and mma.m16n8k16 want them,
// rows g, g + 8, g, g + 8.
template <int chunk>
__device__ __forceinline__ void codes_of(u32 (&a)[4], const Words& words, const Rest& rest) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = i % 2;
#if BITS == 4
        a[i] = add_pairs(merged(words.w[chunk] >> 4 * i, 0x000f000fu), rest.of(-MAGIC_VALUE - 8, row));
#elif BITS == 2
        const int c = 4 * (chunk % 2) + i, up = 2 * (c % 3);  // three fields fit into the mantissa before a shift
        const u32 v = merged(words.w[chunk / 2] >> (2 * c - up), 0x00030003u << up);
        const float number = -MAGIC_VALUE / (1 << up) - 2;
        a[i] = up == 0 ? add_pairs(v, rest.of(number, row))
                       : multiply_add_pairs(v, pair_of(1.0f / (1 << up)), rest.of(number, row));
#elif BITS == 3
        const int f = 4 * chunk + i, at = f % 5, up = f < 15 ? 3 * (at % 2) : 0;
        u32 v;
        if (f < 15) {
            v = merged(words.w[f / 5] >> (3 * at - up), 0x00070007u << up);
        } else {  // spread over bit 15 of the three words
            v = merged(words.w[0] >> 15, 0x00010001u);
            v |= words.w[1] >> 14 & 0x00020002u;
            v |= words.w[2] >> 13 & 0x00040004u;
        }
        const float number = -MAGIC_VALUE / (1 << up) - 4;
        a[i] = up == 0 ? add_pairs(v, rest.of(number, row))
                       : multiply_add_pairs(v, pair_of(1.0f / (1 << up)), rest.of(number, row));
#elif FLOAT16
        const u32 bytes = words.w[chunk * 2 + i / 2] >> 8 * row & 0x00ff00ffu;
        a[i] = add_pairs((bytes ^ 0x00800080u) | MAGIC, rest.of(-MAGIC_VALUE - 128, row));
#else
        // Two's complement: seven bits in the mantissa, and the sign as the lowest bit of the exponent, which turns 128
        // into 256; the difference of the two is the code.
        const u32 bytes = words.w[chunk * 2 + i / 2] >> 8 * row;
        a[i] = subtract_pairs(merged(bytes, 0x007f007fu), merged(bytes, 0x00800080u));
#if ASYM
        a[i] = subtract_pairs(a[i], rest.zero[row]);
#endif
#endif
    }
}
