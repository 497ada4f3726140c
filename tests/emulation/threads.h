// A GPU's threads on one core: fibers that a random order lets run, one at a time, until they wait for each other.
//
// Clusters run one after another, in random order; within one, threads and copies in the background take turns at random,
// some of them seldom. So whatever a kernel forgets to wait for comes too late in some order, and what nobody will ever
// bring is a deadlock that is reported. A launch ends at the first fault with its message.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

namespace emulated {

struct Thread;

// Threads that wait for the same event.
struct Waiters {
    std::vector<Thread*> held;
    void wait(const char* what);
    void wake();
};

// What all threads of a warp, a warpgroup, a block or a cluster do together.
struct Group {
    int live = 0, arrived = 0;
    const char* what = nullptr;
    u32 generation = 0;
    unsigned char given[2][128][64];  // what each hands over; those of one generation are read until the next but one
    Waiters waiters;

    // Waits until all have come; `last` runs once, when they have.
    void together(const char* doing, const std::function<void()>& last = nullptr);
    // The same, and what all gave, `self` being the place of the one who calls.
    template <class T>
    const T* exchange(const char* doing, int self, const T& value, const std::function<void(const T*)>& last = nullptr) {
        static_assert(sizeof(T) <= 64, "");
        const u32 side = generation % 2;
        std::memcpy(given[side][self], &value, sizeof(T));
        T* all = all_of<T>(side);
        together(doing, [&] {
            for (int i = 0; i < 128; i++) std::memcpy(&all[i], given[side][i], sizeof(T));
            if (last) last(all);
        });
        return all;
    }

   private:
    std::vector<std::unique_ptr<unsigned char[]>> copies[2];
    template <class T>
    T* all_of(u32 side) {  // made new by the first who comes
        if (arrived == 0) {
            copies[side].clear();
            copies[side].push_back(std::make_unique<unsigned char[]>(128 * sizeof(T)));
        }
        return (T*)copies[side][0].get();
    }
};

// An mbarrier.
struct Barrier {
    int count = 0, pending = 0;
    long bytes = 0;  // that are still to come
    u32 parity = 0;
    Waiters waiters;
    void arrive(long expected);
    void complete(long came);
    void turn();
};

// Products of a warpgroup, which are carried out some time, in order.
struct Products {
    struct One {
        u32 group;  // how many groups were committed before it
        std::function<void()> run;
    };
    std::deque<One> queue;
    Waiters waiters;
};

struct Block {
    int index, rank;
    unsigned char* memory;  // shared
    std::map<u32, Barrier> barriers;
    std::map<u32, Group> named;
    Group all;
    std::vector<Group> warps, warpgroups;
    std::vector<Products> products;
};

struct Index {
    u32 x, y = 0, z = 0;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index thread, block;
    Block* in = nullptr;
    const char* waits = nullptr;
    const void* depth = nullptr;  // of its stack, while it does not run; what lies below is gone
    bool waited = false;   // for the launches before this one
    u32 commits = 0;       // groups of products
    int taken = 0;         // copies out of shared memory that have not read it yet
    Waiters away;

    Group& warp() const { return in->warps[thread.x / 32]; }
    Group& warpgroup() const { return in->warpgroups[thread.x / 128]; }
    Products& products() const { return in->products[thread.x / 128]; }
    int lane() const { return (int)(thread.x % 32); }
};

struct Range {
    const unsigned char *begin, *end;
    bool contains(const void* p, u64 bytes) const { return begin <= p && (const unsigned char*)p + bytes <= end; }
};

struct Machine {
    std::mt19937_64 random;
    std::vector<Thread*> ready;
    std::vector<std::function<void()>> background;  // copies and products that have not happened yet
    std::vector<std::unique_ptr<Block>> cluster;
    std::vector<Range> early;  // what no earlier launch writes
    std::string fault;
    ucontext_t scheduler;
    u64 lazy = 0;                        // of so many steps one is a copy or a product
    std::function<bool(const Thread&)> slow;  // threads that seldom run while others can
    Index grid;
    int shared = 0, blocks_of_cluster = 1, threads_left = 0;
    Group everybody;  // of the cluster

    u64 below(u64 n) { return random() % n; }
    void choose_pace(int threads);
    Thread* next();
    [[noreturn]] void fail(const std::string& what);
    void run_cluster(int first, int threads, const std::function<void()>& kernel);
};

extern Machine machine;
extern Thread* here;

constexpr u32 BASE = 0x410;  // where shared memory begins: what a kernel wants aligned, it has to align
constexpr u32 ROOM = 228 << 10;

// `bytes` of shared memory of block `rank` of the cluster, which must lie in what the launch asked for.
unsigned char* shared_at(u32 address, u32 bytes, int rank);
inline unsigned char* shared_at(u32 address, u32 bytes) { return shared_at(address, bytes, here->in->rank); }
Barrier& barrier_at(u32 address, int rank);

}  // namespace emulated

alignas(1024) extern unsigned char memory[];
