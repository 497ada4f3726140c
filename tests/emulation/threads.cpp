// The scheduler of `threads.h`.
#include "threads.h"

namespace emulated {

alignas(1024) static unsigned char memory[SLOTS * ROOM];
Machine machine;
Thread* here = nullptr;

static const std::function<void()>* entry;

struct Fault {};

void Machine::fail(const std::string& what) {
    if (fault.empty()) {
        fault = what;
        if (here)
            fault += " (block " + std::to_string(here->in->index) + ", thread " + std::to_string(here->thread.x) + ")";
    }
    if (here) setcontext(&scheduler);
    throw Fault();  // by a copy in the background, which the scheduler carries out
}

static void yield() {
    here->depth = __builtin_frame_address(0);
    swapcontext(&here->context, &machine.scheduler);
}

void Waiters::wait(const char* what) {
    here->waits = what;
    held.push_back(here);
    yield();
}

void Waiters::wake() {
    machine.ready.insert(machine.ready.end(), held.begin(), held.end());
    held.clear();
}

void Group::together(const char* doing, const std::function<void()>& last) {
    if (arrived + 1 == live && last) last();
    wait(doing, arrive(doing));
}

u32 Group::arrive(const char* doing) {
    if (arrived == 0) what = doing;
    if (std::strcmp(what, doing)) machine.fail(std::string("threads of one group come to ") + what + " and to " + doing);
    const u32 before = generation;
    if (++arrived == live) {
        arrived = 0, generation++;
        waiters.wake();
    }
    return before;
}

void Group::wait(const char* doing, u32 before) {
    while (generation == before) waiters.wait(doing);
}

void Barrier::arrive(long expected) {
    if (count == 0) machine.fail("a barrier that was never initialized");
    if (pending == 0) machine.fail("more arrive at a barrier than it waits for");
    bytes += expected, pending--;
    turn();
}

void Barrier::complete(long came) {
    if (count == 0) machine.fail("bytes for a barrier that is not initialized yet");
    bytes -= came;
    turn();
}

void Barrier::turn() {
    if (pending || bytes) return;
    parity ^= 1, pending = count;
    waiters.wake();
}

void let_others_run() {
    // Now and then for long: others go on with what this thread has not written yet.
    if (machine.below(512) == 0)
        machine.slow = [late = here, before = machine.slow](const Thread& t) { return &t == late || before(t); };
    here->waits = "nothing";
    machine.ready.push_back(here);
    yield();
}

unsigned char* shared_at(u32 address, u32 bytes, int slot) {
    if (address < BASE || address + bytes > BASE + (u32)machine.shared)
        machine.fail("shared memory at " + std::to_string(address) + " of " + std::to_string(machine.shared) + " bytes");
    if (address % std::min(bytes, 16u)) machine.fail("unaligned shared memory at " + std::to_string(address));
    return memory + slot * ROOM + (address - BASE);
}

Barrier& barrier_at(u32 address, int slot) {
    shared_at(address, 8, slot);
    Block& block = *machine.blocks[slot];
    if (block.all.live == 0) machine.fail("a barrier of a block that has ended");
    return block.barriers[address];
}

static void leave(Group& group) {
    group.live--;
    if (group.arrived && group.arrived == group.live)
        machine.fail(std::string("a thread ended that others wait for in ") + group.what);
}

static void start() {
    (*entry)();
    if (here->taken) machine.fail("a thread ended before its results were read from shared memory");
    if (!here->products().queue.empty()) machine.fail("a thread ended before its products");
    leave(here->warp()), leave(here->warpgroup()), leave(here->in->all), leave(*here->in->everybody);
    machine.threads_left--;
    here->waits = "nothing: it has ended";
    setcontext(&machine.scheduler);
}

// Uniform orders hardly ever let one block, warp or thread fall far behind the others, or a copy behind all.
void Machine::choose_pace(int threads) {
    lazy = u64(1) << 2 * below(8);
    const u32 block = (u32)below(blocks.size()), thread = (u32)below(threads);
    const u32 of = std::array<u32, 4>{1, 32, 128, ROOM}[below(4)];  // a thread, a warp, a warpgroup, or the block
    const bool none = below(4) == 0;
    slow = [=](const Thread& t) {
        return !none && t.in->slot == (int)block && t.thread.x / of == thread / of;
    };
}

Thread* Machine::next() {
    u64 n = below(ready.size());
    for (int again = 0; again < 100 && slow(*ready[n]); again++) n = below(ready.size());
    Thread* chosen = ready[n];
    ready[n] = ready.back(), ready.pop_back();
    return chosen;
}

void Machine::run(const std::vector<int>& first, int threads, const std::function<void()>& kernel) {
    entry = &kernel;
    blocks.clear(), clusters.clear(), ready.clear(), background.clear();
    threads_left = (int)first.size() * blocks_of_cluster * threads;
    std::vector<std::unique_ptr<Thread>> all;
    for (int slot = 0; slot < (int)first.size() * blocks_of_cluster; slot++) {
        const int rank = slot % blocks_of_cluster, index = first[slot / blocks_of_cluster] + rank;
        if (rank == 0) clusters.push_back(std::make_unique<Group>());
        auto block = std::make_unique<Block>();
        block->index = index, block->rank = rank, block->slot = slot, block->memory = memory + slot * ROOM;
        block->everybody = clusters.back().get();
        block->everybody->live += threads;
        std::memset(block->memory, 0xff, ROOM);  // NaN
        block->all.live = threads;
        block->warps = std::vector<Group>((threads + 31) / 32);
        block->warpgroups = std::vector<Group>((threads + 127) / 128);
        block->products = std::vector<Products>((threads + 127) / 128);
        for (int t = 0; t < threads; t++) {
            auto thread = std::make_unique<Thread>();
            thread->thread.x = t, thread->block.x = index, thread->in = block.get();
            block->warps[t / 32].live++, block->warpgroups[t / 128].live++;
            constexpr size_t STACK = 64 << 10;
            thread->stack.reset(new char[STACK]);
            getcontext(&thread->context);
            thread->context.uc_stack.ss_sp = thread->stack.get(), thread->context.uc_stack.ss_size = STACK;
            makecontext(&thread->context, start, 0);
            ready.push_back(thread.get());
            all.push_back(std::move(thread));
        }
        blocks.push_back(std::move(block));
    }
    choose_pace(threads);
    while (fault.empty() && (threads_left || !background.empty())) {
        if (below(10000) == 0) choose_pace(threads);
        const bool copies = !background.empty() && (ready.empty() || below(lazy) == 0);
        if (!copies && !ready.empty()) {
            here = next();
            swapcontext(&scheduler, &here->context);  // a thread that waits, ends or fails comes back to this place
            here = nullptr;
        } else if (copies) {
            const u64 b = below(background.size());
            const std::function<void()> run = std::move(background[b]);
            background[b] = std::move(background.back()), background.pop_back();
            try {
                run();
            } catch (const Fault&) {
            }
        }
        if (fault.empty() && ready.empty() && background.empty() && threads_left) {
            std::map<std::string, int> counted;
            for (auto& t : all) counted["block " + std::to_string(t->in->index) + ", warp " +
                                        std::to_string(t->thread.x / 32) + " waits for " + t->waits]++;
            fault = "deadlock:";
            for (auto& [what, count] : counted) fault += "\n" + what + " (" + std::to_string(count) + " threads)";
        }
    }
}

}  // namespace emulated
