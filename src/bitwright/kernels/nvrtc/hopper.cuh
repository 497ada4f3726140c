// Hopper's instructions that CUDA C++ has no words for. Addresses of shared memory are 32-bit ones of this block.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- mbarriers ----

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Barriers that were initialized before this are there for TMA and for other blocks of the cluster.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier at the same place in block `rank` of the cluster. What came before are reads, which end before
// their values are used: nothing has to be made visible to the other block, and a release to the cluster would be a
// fence of all memory.
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// At one of this block.
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool barrier_passed(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(passed)
        : "r"(barrier), "r"(parity)
        : "memory");
    return passed;
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    while (!barrier_passed(barrier, parity)) {
    }
}

__device__ __forceinline__ void cluster_sync() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same for barriers alone, whose initialization has its own release (fence.mbarrier_init).
__device__ __forceinline__ void cluster_sync_barriers() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// In two halves.
__device__ __forceinline__ void cluster_arrive_barriers() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Own accesses of memory before this, and those of others that were seen, before own ones after it, for all of the GPU.
__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// One thread of a warp. The compiler knows that it is alone: it keeps addresses of TMA in uniform registers, which took a
// loop for each without.
__device__ __forceinline__ bool elected() {
    u32 yes;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p; }" : "=r"(yes));
    return yes != 0;
}

// The number of a warp, the same for all its threads as the compiler sees it.
__device__ __forceinline__ u32 warp_number() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// Of the threads that name it, which are `threads` many.
__device__ __forceinline__ void named_sync(u32 name, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// As `named_sync`, without waiting.
__device__ __forceinline__ void named_arrive(u32 name, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// ---- dependent launches ----

// Until the launches before this one have ended and what they wrote can be seen.
__device__ __forceinline__ void wait_for_launches() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next launch may begin, once all blocks have said so.
__device__ __forceinline__ void allow_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- TMA ----

// A map is fetched when it is first used, unless it was before.
__device__ __forceinline__ void fetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box at (column, row) to shared memory of this block.
__device__ __forceinline__ void bring(u32 to, const TensorMap& map, u32 barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// The same to the blocks of `mask`, and to their barriers.
__device__ __forceinline__ void bring_all(u32 to, const TensorMap& map, u32 barrier, int column, int row, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(mask)
        : "memory");
}

// `bytes` that follow each other, a multiple of 16 at multiples of 16.
__device__ __forceinline__ void bring_run(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void take_away(const TensorMap& map, u32 from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(from),
                 "r"(column), "r"(row)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until what this thread took away has left shared memory.
__device__ __forceinline__ void wait_taken() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Own writes to shared memory before what TMA and the tensor cores do with it afterwards.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor cores; the products are in instructions.cuh ----

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `pending` groups of products are under way.
template <int pending>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Sums are read after the wait before this, not earlier: the compiler does not know that a wait concerns them.
template <int count>
__device__ __forceinline__ void products_done(int (&sums)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+r"(sums[i])::"memory");
}

template <int count>
__device__ __forceinline__ void products_done(float (&sums)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// An operand in rows of `row_bytes` (128 or 64), swizzled over as many bytes, 8 rows after 8 rows: the low word says
// where, the high one how it lies.
__device__ __forceinline__ u32 operand_low(u32 address) { return (address & 0x3ffff) >> 4 | 1 << 16; }

__device__ constexpr u32 operand_high(int row_bytes) { return 8 * row_bytes >> 4 | (row_bytes == 128 ? 1u : 2u) << 30; }

template <int row_bytes>
__device__ __forceinline__ u64 operand(u32 address) {
    return (u64)operand_high(row_bytes) << 32 | operand_low(address);
}

template <int registers>
__device__ __forceinline__ void set_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void set_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// ---- shared memory ----

struct Words4 {
    u32 w[4];
};
struct Words2 {
    u32 w[2];
};

__device__ __forceinline__ Words4 read16(u32 address) {
    Words4 r;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
                 : "r"(address)
                 : "memory");
    return r;
}

__device__ __forceinline__ u32 read4(u32 address) {
    u32 r;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
    return r;
}

__device__ __forceinline__ void write4(u32 address, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ u32 read2(u32 address) {
    u16 r;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(r) : "r"(address) : "memory");
    return r;
}

__device__ __forceinline__ void write16(u32 address, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Two bytes, in both halves of the result.
__device__ __forceinline__ u32 read2_twice(u32 address) {
    u32 r;
    asm volatile("{ .reg .b16 h; ld.shared.b16 h, [%1]; mov.b32 %0, {h, h}; }" : "=r"(r) : "r"(address) : "memory");
    return r;
}

__device__ __forceinline__ Words2 read8(u32 address) {
    Words2 r;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "r"(address) : "memory");
    return r;
}

// Four 8 x 8 matrices of 16 bits, transposed; the lane gives the address of row lane % 8 of matrix lane / 8.
__device__ __forceinline__ void write_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// ---- shared memory of the blocks of a cluster ----

// Numbers on their way to the same place in block `rank`, where the barrier counts their bytes: nobody has to make them
// visible, as a release to the cluster would, which is a fence of all memory.
__device__ __forceinline__ void send16(u32 address, float a, float b, float c, float d, u32 barrier, u32 rank) {
    asm volatile(
        "{ .reg .b32 there, counted; mapa.shared::cluster.u32 there, %0, %6; mapa.shared::cluster.u32 counted, %5, %6;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1, %2, %3, %4}, [counted]; }" ::"r"(
            address),
        "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier), "r"(rank)
        : "memory");
}

__device__ __forceinline__ void send8(u32 address, float a, float b, u32 barrier, u32 rank) {
    asm volatile(
        "{ .reg .b32 there, counted; mapa.shared::cluster.u32 there, %0, %4; mapa.shared::cluster.u32 counted, %3, %4;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%1, %2}, [counted]; }" ::"r"(address),
        "f"(a), "f"(b), "r"(barrier), "r"(rank)
        : "memory");
}

// ---- memory of the GPU ----

struct alignas(16) Four {
    u32 v[4];
};

// Leaves four numbers in memory and takes what was there, in one go.
__device__ __forceinline__ Four exchanged(Four* at, const Four& x) {
    Four r;
    asm volatile(
        "{ .reg .b128 given, found; .reg .b64 low, high;\n"
        "mov.b64 low, {%4, %5}; mov.b64 high, {%6, %7}; mov.b128 given, {low, high};\n"
        "atom.global.exch.b128 found, [%8], given;\n"
        "mov.b128 {low, high}, found; mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high; }"
        : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
        : "r"(x.v[0]), "r"(x.v[1]), "r"(x.v[2]), "r"(x.v[3]), "l"(at)
        : "memory");
    return r;
}

// ---- arithmetic ----

// 2^v, 0 for minus infinity.
__device__ __forceinline__ float power_of_two(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// (word & mask) | ones, in one instruction.
template <u32 ones>
__device__ __forceinline__ u32 and_or(u32 word, u32 mask) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "r"(mask), "n"(ones));
    return r;
}
