// Products of a warpgroup, as PTX lays out their operands; TOKENS columns of the result.
#pragma once
#include "half.cuh"

// A number of a K-major operand in shared memory.
template <class T>
T number_at(u64 described, int row, int k, int slot) {
    const u32 start = (u32)(described & 0x3fff) << 4, eight_rows = (u32)(described >> 32 & 0x3fff) << 4;
    const u32 row_bytes = described >> 62 == 1 ? 128 : 64;
    const u32 at = start + row / 8 * eight_rows + row % 8 * row_bytes + k * (u32)sizeof(T);
    T r;
    std::memcpy(&r, emulated::shared_at(swizzled(at, row_bytes), sizeof(T), slot), sizeof(T));
    return r;
}

// What a thread gives to a product: its part of the left operand, and where its sums are.
template <class T>
struct Given {
    T* d;
    u32 a[4], where;
    u64 right;
    const emulated::Thread* owner;
};

// What runs when all 128 threads have come, some time before they have waited for it.
template <class T>
void together_later(T* d, const u32 (&a)[4], u32 where, u64 right, const std::function<void(const Given<T>*)>& run) {
    auto& products = emulated::here->products();
    const u32 group = emulated::here->commits;
    const Given<T> own = {d, {a[0], a[1], a[2], a[3]}, where, right, emulated::here};
    emulated::here->warpgroup().exchange<Given<T>>("wgmma", threadIdx.x % 128, own, [&](const Given<T>* all) {
        std::vector<Given<T>> held(all, all + 128);
        for (const auto& one : held)
            if (one.right != right || one.owner->commits != group)
                emulated::machine.fail("threads of a warpgroup give different operands");
        products.queue.push_back({group, [=] {
            for (const auto& one : held)
                if ((const void*)one.d < one.owner->depth) emulated::machine.fail("a product for sums that are gone");
            run(held.data());
        }});
        emulated::machine.background.push_back([&products] {
            products.queue.front().run();
            products.queue.pop_front();
            products.waiters.wake();
        });
    });
}

inline void weight_product(float (&d)[TOKENS / 2], const u32 (&a)[4], u32 low) {
    const u64 b = (u64)operand_high(128) << 32 | low;
    const int slot = emulated::here->in->slot;
    together_later<float>(d, a, 0, b, [=](const Given<float>* all) {
        float left[64][16];
        for (int row = 0; row < 64; row++)
            for (int k = 0; k < 16; k++) {
                const auto& from = all[row / 16 * 32 + row % 8 * 4 + k % 8 / 2];
                left[row][k] = number_of(from.a[2 * (k / 8) + row % 16 / 8] >> k % 2 * 16 & 0xffff);
            }
        for (int n = 0; n < TOKENS; n++) {
            float right[16];
            for (int k = 0; k < 16; k++) right[k] = number_of(number_at<u16>(b, n, k, slot));
            for (int row = 0; row < 64; row++) {
                float* sum = all[row / 16 * 32 + row % 8 * 4 + n % 8 / 2].d + n / 8 * 4 + row % 16 / 8 * 2 + n % 2;
                float products = 0;
                for (int k = 0; k < 16; k++) products += left[row][k] * right[k];
                *sum += products;
            }
        }
    });
}

// Rows of 64 columns of which every four keep two.
inline void sparse_product(int (&d)[TOKENS / 2], const u32 (&a)[4], u64 b, u32 where) {
    const int slot = emulated::here->in->slot;
    together_later<int>(d, a, where, b, [=](const Given<int>* all) {
        for (int n = 0; n < TOKENS; n++) {
            int right[64];
            for (int k = 0; k < 64; k++) right[k] = number_at<signed char>(b, n, k, slot);
            for (int row = 0; row < 64; row++) {
                const auto* line = all + row / 16 * 32 + row % 8 * 4;
                int sum = 0;
                for (int kept = 0; kept < 32; kept++) {
                    const int group = kept / 2, half = row % 16 / 8;
                    const u32 nibble = line[2 * (group / 8) + half].where >> 4 * (group % 8);
                    const int column = nibble >> kept % 2 * 2 & 3;
                    const u32 word = line[kept % 16 / 4].a[2 * (kept / 16) + half];
                    sum += (signed char)(word >> 8 * (kept % 4)) * right[4 * group + column];
                }
                all[row / 16 * 32 + row % 8 * 4 + n % 8 / 2].d[n / 8 * 4 + row % 16 / 8 * 2 + n % 2] += sum;
            }
        }
    });
}

inline void outlier_product(float (&d)[TOKENS / 2], u64 a, u64 b) {
    const int slot = emulated::here->in->slot;
    together_later<float>(d, {0, 0, 0, 0}, 0, a ^ b << 1, [=](const Given<float>* all) {
        for (int n = 0; n < TOKENS; n++)
            for (int row = 0; row < 64; row++) {
                float products = 0;
                for (int k = 0; k < 16; k++)
                    products += number_of(number_at<u16>(a, row, k, slot)) * number_of(number_at<u16>(b, n, k, slot));
                all[row / 16 * 32 + row % 8 * 4 + n % 8 / 2].d[n / 8 * 4 + row % 16 / 8 * 2 + n % 2] += products;
            }
    });
}
