// A kernel (macros SOURCE, KERNEL) and how it is launched.
#include "cuda.h"
#include SOURCE

#include <utility>

namespace {

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_const_t<A>*)arguments[I]...);
}

template <class... A>
void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>{});
}

std::string said;

}  // namespace

// arguments: their addresses; early, late: pairs of addresses, begin and end, of what is there before and of what is there
// when a thread has waited for earlier launches. Gives what went wrong, or "".
extern "C" const char* emulated_launch(int blocks, int threads, int shared, int cluster, void** arguments,
                                       const unsigned char** early, int early_count, unsigned char** late,
                                       int late_count, u64 seed) {
    auto& m = emulated::machine;
    m.random.seed(seed);
    m.fault.clear(), m.early.clear();
    m.shared = shared, m.blocks_of_cluster = cluster, m.grid.x = (u32)blocks;
    for (int i = 0; i < early_count; i++) m.early.push_back({early[2 * i], early[2 * i + 1]});
    for (int i = 0; i < late_count; i++) m.late.emplace_back(late[2 * i], late[2 * i + 1] - late[2 * i]);
    std::vector<int> order;
    for (int b = 0; b < blocks; b += cluster) order.push_back(b);
    std::shuffle(order.begin(), order.end(), m.random);
    const size_t most = 1 + m.below(std::min(4, emulated::SLOTS / cluster));  // clusters at a time
    for (size_t i = 0; i < order.size() && m.fault.empty(); i += most) {
        const std::vector<int> some(order.begin() + i, order.begin() + std::min(i + most, order.size()));
        m.run(some, threads, [&] { call(&KERNEL, arguments); });
    }
    for (auto& held : m.late) held.arrive();
    m.late.clear();
    said = m.fault;
    return said.c_str();
}
