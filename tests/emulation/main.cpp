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

// arguments: their addresses; early: pairs of addresses, begin and end. Gives what went wrong, or "".
extern "C" const char* emulated_launch(int blocks, int threads, int shared, int cluster, void** arguments,
                                       const unsigned char** early, int ranges, u64 seed) {
    auto& m = emulated::machine;
    m.random.seed(seed);
    m.fault.clear(), m.early.clear();
    m.shared = shared, m.blocks_of_cluster = cluster, m.grid.x = (u32)blocks;
    for (int i = 0; i < ranges; i++) m.early.push_back({early[2 * i], early[2 * i + 1]});
    std::vector<int> order;
    for (int b = 0; b < blocks; b += cluster) order.push_back(b);
    std::shuffle(order.begin(), order.end(), m.random);
    for (const int first : order) {
        m.run_cluster(first, threads, [&] { call(&KERNEL, arguments); });
        if (!m.fault.empty()) break;
    }
    said = m.fault;
    return said.c_str();
}
