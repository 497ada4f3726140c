// Products of one warp, as PTX lays out their operands.
#pragma once
#include "half.cuh"

inline void read_matrices(u32 (&r)[4], u32 address) {
    const int lane = emulated::here->lane();
    const u32* rows = emulated::here->warp().exchange("ldmatrix", lane, address);
    for (int matrix = 0; matrix < 4; matrix++) r[matrix] = read4(rows[8 * matrix + lane / 4] + 4 * (lane % 4));
    emulated::here->warp().together("ldmatrix");
}

inline void product(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    struct Given {
        u32 a[4], b[2];
    };
    const int lane = emulated::here->lane();
    const Given* all = emulated::here->warp().exchange("mma", lane, Given{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; k++) {
            const int t = k % 8 / 2, s = k % 2 * 16, high = k / 8;
            sum += (double)number_of(all[4 * row + t].a[2 * high + i / 2] >> s & 0xffff) *
                   number_of(all[4 * column + t].b[high] >> s & 0xffff);
        }
        d[i] = (float)sum;
    }
}
