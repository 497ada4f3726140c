// The instructions of the kernels' own hopper.cuh, carried out by `threads.h`. Copies and products happen at a random time
// between what begins them and what waits for them; but a product takes its left operand when it begins, so that registers
// which are overwritten too early are not seen (tests/sass.py looks for them in what is compiled for Hopper).
#pragma once
#include "cuda.h"

struct alignas(64) TensorMap {  // what `emulator.TensorMap` writes
    unsigned char* address;
    u64 rows, columns, size;  // size: bytes of a number
    u64 box_rows, box_columns, swizzle;
    u64 unused[9];
};

// What a block asks for begins there.
inline u32 shared_address(const void*) { return emulated::BASE; }

// ---- mbarriers ----

inline void barrier_init(u32 barrier, u32 count) {
    auto& b = emulated::barrier_at(barrier, emulated::here->in->slot);
    if (b.count) emulated::machine.fail("a barrier that is initialized twice");
    b.count = b.pending = (int)count;
}

inline void barriers_ready() {}

inline void barrier_expect(u32 barrier, u32 bytes) {
    emulated::barrier_at(barrier, emulated::here->in->slot).arrive(bytes);
}

inline void barrier_arrive(u32 barrier, u32 rank) {
    if ((int)rank >= emulated::machine.blocks_of_cluster) emulated::machine.fail("a block that the cluster has not");
    emulated::barrier_at(barrier, emulated::slot_of((int)rank)).arrive(0);
}

inline void barrier_arrive(u32 barrier) { emulated::barrier_at(barrier, emulated::here->in->slot).arrive(0); }

inline void barrier_wait(u32 barrier, u32 parity) {
    auto& b = emulated::barrier_at(barrier, emulated::here->in->slot);
    if (b.count == 0) emulated::machine.fail("waits for a barrier that was never initialized");
    while (b.parity == (parity & 1)) b.waiters.wait("an mbarrier");
}

inline void cluster_arrive_barriers() {
    emulated::here->arrived_at = emulated::here->in->everybody->arrive("a barrier of the cluster");
}
inline void cluster_wait() {
    emulated::here->in->everybody->wait("a barrier of the cluster", emulated::here->arrived_at);
}
inline void cluster_sync_barriers() { cluster_arrive_barriers(), cluster_wait(); }
inline void cluster_sync() { cluster_sync_barriers(); }
inline void fence_gpu() { emulated::let_others_run(); }
inline u32 cluster_rank() { return (u32)emulated::here->in->rank; }

// Any lane may be the one, always the same.
inline bool elected() {
    emulated::here->warp().together("elect");
    return emulated::here->lane() == 19;
}

inline u32 warp_number() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

inline void named_come(u32 name, u32 threads, bool waits) {
    auto& group = emulated::here->in->named[name];
    if (group.arrived == 0) group.live = (int)threads;
    if (group.live != (int)threads) emulated::machine.fail("a barrier of one name and two numbers of threads");
    const u32 before = group.arrive("a named barrier");
    if (waits) group.wait("a named barrier", before);
}
inline void named_sync(u32 name, u32 threads) { named_come(name, threads, true); }
inline void named_arrive(u32 name, u32 threads) { named_come(name, threads, false); }

// ---- dependent launches ----

inline void wait_for_launches() {
    emulated::here->waited = true;
    for (auto& late : emulated::machine.late) late.arrive();
    emulated::machine.late.clear();
}
inline void allow_launch() {}

// ---- TMA ----

inline void fetch_map(const TensorMap&) {}

// Where the swizzle puts a byte, by its address.
inline u32 swizzled(u32 at, u64 row_bytes) {
    return row_bytes == 128 ? at ^ (at >> 7 & 7) << 4 : row_bytes == 64 ? at ^ (at >> 7 & 3) << 4 : at;
}

// Memory that an earlier launch may still write is read by TMA for those alone who waited for it.
inline void check_source(const void* from, u64 bytes) {
    if (emulated::here->waited) return;
    for (const auto& range : emulated::machine.early)
        if (range.contains(from, bytes)) return;
    emulated::machine.fail("reads what an earlier launch may write, without waiting for it");
}

inline void copy_box(u32 to, const TensorMap& map, int column, int row, int slot) {
    const u64 row_bytes = map.box_columns * map.size;
    for (u64 r = 0; r < map.box_rows; r++)
        for (u64 c = 0; c < map.box_columns; c++) {
            const u64 y = row + r, x = column + c;
            const u32 at = swizzled(to + (u32)(r * row_bytes + c * map.size), map.swizzle);
            unsigned char* place = emulated::shared_at(at, (u32)map.size, slot);
            if (row >= 0 && column >= 0 && y < map.rows && x < map.columns)
                std::memcpy(place, map.address + (y * map.columns + x) * map.size, map.size);
            else
                std::memset(place, 0, map.size);
        }
}

inline void bring_all(u32 to, const TensorMap& map, u32 barrier, int column, int row, u16 mask) {
    if (to % 128) emulated::machine.fail("TMA to an unaligned place");
    check_source(map.address, 1);
    for (int rank = 0; rank < emulated::machine.blocks_of_cluster; rank++)
        if (mask >> rank & 1)
            emulated::machine.background.push_back([=, held = map, slot = emulated::slot_of(rank)] {
                copy_box(to, held, column, row, slot);
                emulated::barrier_at(barrier, slot).complete((long)(held.box_rows * held.box_columns * held.size));
            });
}

inline void bring(u32 to, const TensorMap& map, u32 barrier, int column, int row) {
    bring_all(to, map, barrier, column, row, (u16)(1 << emulated::here->in->rank));
}

inline void bring_run(u32 to, const void* from, u32 bytes, u32 barrier) {
    if (to % 16 || (u64)from % 16 || bytes % 16) emulated::machine.fail("a copy that is not in sixteens of bytes");
    bool known = bytes == 0;
    for (const auto& range : emulated::machine.early) known |= range.contains(from, bytes);
    if (!known) emulated::machine.fail("copies what is no weight");
    const int slot = emulated::here->in->slot;
    emulated::machine.background.push_back([=] {
        if (bytes) emulated::shared_at(to + bytes - 1, 1, slot);
        std::memcpy(emulated::shared_at(to, 1, slot), from, bytes);
        emulated::barrier_at(barrier, slot).complete(bytes);
    });
}

inline void take_away(const TensorMap& map, u32 from, int column, int row) {
    if (from % 128) emulated::machine.fail("TMA from an unaligned place");
    emulated::Thread* owner = emulated::here;
    owner->taken++;
    emulated::machine.background.push_back([=, held = map] {
        for (u64 r = 0; r < held.box_rows; r++)
            for (u64 c = 0; c < held.box_columns; c++) {
                const u32 at = swizzled(from + (u32)((r * held.box_columns + c) * held.size), held.swizzle);
                const u64 y = row + r, x = column + c;
                if (y < held.rows && x < held.columns)
                    std::memcpy(held.address + (y * held.columns + x) * held.size,
                                emulated::shared_at(at, (u32)held.size, owner->in->slot), held.size);
            }
        if (--owner->taken == 0) owner->away.wake();
    });
}

inline void wait_taken() {
    while (emulated::here->taken) emulated::here->away.wait("its results to be read");
}
inline void fence_async() {}

// ---- tensor cores; the products are in instructions.cuh ----

inline void products_fence() {}
inline void products_commit() { emulated::here->commits++; }

template <int pending>
void products_wait() {
    auto& products = emulated::here->products();
    while (!products.queue.empty() && products.queue.front().group + pending < emulated::here->commits)
        products.waiters.wait("products");
}

template <class T, int count>
void products_done(T (&)[count]) {}

inline u32 operand_low(u32 address) { return (address & 0x3ffff) >> 4 | 1 << 16; }
constexpr u32 operand_high(int row_bytes) { return 8 * row_bytes >> 4 | (row_bytes == 128 ? 1u : 2u) << 30; }

template <int row_bytes>
u64 operand(u32 address) {
    return (u64)operand_high(row_bytes) << 32 | operand_low(address);
}

template <int registers>
void set_registers_up() {}
template <int registers>
void set_registers_down() {}

// ---- shared memory ----

struct Words4 {
    u32 w[4];
};
struct Words2 {
    u32 w[2];
};

template <class T>
T read_shared(u32 address) {
    T r;
    std::memcpy(&r, emulated::shared_at(address, sizeof(T)), sizeof(T));
    return r;
}
template <class T>
void write_shared(u32 address, const T& v) {
    std::memcpy(emulated::shared_at(address, sizeof(T)), &v, sizeof(T));
}

inline Words4 read16(u32 address) { return read_shared<Words4>(address); }
inline Words2 read8(u32 address) { return read_shared<Words2>(address); }
inline u32 read4(u32 address) { return read_shared<u32>(address); }
inline u32 read2(u32 address) { return read_shared<u16>(address); }
inline u32 read2_twice(u32 address) { return read2(address) * 0x10001u; }
inline void write4(u32 address, u32 value) { write_shared(address, value); }
inline void write16(u32 address, float a, float b, float c, float d) { write_shared(address, float4{a, b, c, d}); }

// ---- shared memory of the blocks of a cluster ----

template <class T>
void send(u32 address, const T& v, u32 barrier, u32 rank) {
    if (emulated::here->in->everybody->generation == 0)
        emulated::machine.fail("sends to a block that may not have begun");
    emulated::machine.background.push_back([=, slot = emulated::slot_of((int)rank)] {
        std::memcpy(emulated::shared_at(address, sizeof(T), slot), &v, sizeof(T));
        emulated::barrier_at(barrier, slot).complete(sizeof(T));
    });
}
inline void send16(u32 address, float a, float b, float c, float d, u32 barrier, u32 rank) {
    send(address, float4{a, b, c, d}, barrier, rank);
}
inline void send8(u32 address, float a, float b, u32 barrier, u32 rank) {
    struct Two {
        float a, b;
    };
    send(address, Two{a, b}, barrier, rank);
}

// ---- arithmetic ----

inline float power_of_two(float v) { return std::exp2(v); }

inline void write_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const int lane = emulated::here->lane();
    const u32* rows = emulated::here->warp().exchange("stmatrix", lane, address);
    const u32 given[4] = {a, b, c, d};
    for (int matrix = 0; matrix < 4; matrix++)
        for (int half = 0; half < 2; half++)
            write_shared<u16>(rows[8 * matrix + 2 * (lane % 4) + half] + 2 * (lane / 4),
                              (u16)(given[matrix] >> 16 * half));
    emulated::here->warp().together("stmatrix");
}

// ---- memory of the GPU ----

struct alignas(16) Four {
    u32 v[4];
};

inline Four exchanged(Four* at, const Four& x) {
    emulated::let_others_run();
    const Four before = *at;
    *at = x;
    return before;
}

// ---- logic ----

template <u32 ones>
u32 and_or(u32 word, u32 mask) {
    return (word & mask) | ones;
}
