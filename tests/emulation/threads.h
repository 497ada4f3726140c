// A GPU's threads on one core: fibers that a random order lets run, one at a time, until they wait for each other.
//
// A few clusters run at a time, in random order; their threads and copies in the background take turns at random, some of
// them seldom. A thread goes on until it waits, or touches memory in a way that other blocks are meant to see (atomics,
// fences, accesses past L1). So whatever a kernel forgets to wait for comes too late in some order, and what nobody will
// ever bring is a deadlock that is reported. A launch ends at the first fault with its message.
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
    Waiters waiters;

    // Waits until all have come; `last` runs once, when they have.
    void together(const char* doing, const std::function<void()>& last = nullptr);
    // The same in two halves: what `arrive` gives is for `wait`.
    u32 arrive(const char* doing);
    void wait(const char* doing, u32 before);
    // The same, and what all gave, `self` being the place of the one who calls.
    template <class T>
    const T* exchange(const char* doing, int self, const T& value, const std::function<void(const T*)>& last = nullptr) {
        T* all = all_of<T>(generation % 2);
        std::memcpy(&all[self], &value, sizeof(T));
        together(doing, [&] {
            if (last) last(all);
        });
        return all;
    }

   private:
    // What each hands over; that of one generation is read until the next but one.
    std::unique_ptr<unsigned char[]> given[2];
    template <class T>
    T* all_of(u32 side) {  // made new by the first who comes
        if (arrived == 0) given[side] = std::make_unique<unsigned char[]>(128 * sizeof(T));
        return (T*)given[side].get();
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
    int index, rank, slot;      // of the grid, of its cluster, of those that run
    unsigned char* memory;      // shared
    int number = -1;            // the one number that a kernel may share by name
    Group* everybody = nullptr; // of the cluster
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
    u32 arrived_at = 0;    // the barrier of the cluster
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

// Memory that holds NaN until a thread has waited for the launches before this one.
struct Late {
    unsigned char* at;
    std::vector<unsigned char> bytes;
    explicit Late(unsigned char* at, u64 size) : at(at), bytes(at, at + size) { std::memset(at, 0xff, size); }
    void arrive() { std::memcpy(at, bytes.data(), bytes.size()); }
};

struct Machine {
    std::mt19937_64 random;
    std::vector<Thread*> ready;
    std::vector<std::function<void()>> background;  // copies and products that have not happened yet
    std::vector<std::unique_ptr<Block>> blocks;     // that run, clusters side by side
    std::vector<Range> early;                       // what no earlier launch writes
    std::vector<Late> late;                         // what one does, as far as it is checked
    std::string fault;
    ucontext_t scheduler;
    u64 lazy = 0;                             // of so many steps one is a copy or a product
    std::function<bool(const Thread&)> slow;  // threads that seldom run while others can
    Index grid;
    int shared = 0, blocks_of_cluster = 1, threads_left = 0;
    std::vector<std::unique_ptr<Group>> clusters;

    u64 below(u64 n) { return random() % n; }
    void choose_pace(int threads);
    Thread* next();
    [[noreturn]] void fail(const std::string& what);
    // Of blocks `first` on, one of each cluster.
    void run(const std::vector<int>& first, int threads, const std::function<void()>& kernel);
};

extern Machine machine;
extern Thread* here;

constexpr u32 BASE = 0x410;  // where shared memory begins: what a kernel wants aligned, it has to align
constexpr u32 ROOM = 228 << 10;
constexpr int SLOTS = 8;  // blocks that run at a time

// `bytes` of shared memory of a block, which must lie in what the launch asked for.
unsigned char* shared_at(u32 address, u32 bytes, int slot);
inline unsigned char* shared_at(u32 address, u32 bytes) { return shared_at(address, bytes, here->in->slot); }
Barrier& barrier_at(u32 address, int slot);
// The slot of block `rank` of this one's cluster.
inline int slot_of(int rank) { return here->in->slot - here->in->rank + rank; }
void let_others_run();

}  // namespace emulated

