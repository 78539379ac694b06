// Work divided over threads by whole blocks. What an element's value is never depends on the division.
#pragma once

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

#include "seme.h"

namespace seme {

// Calls fn(part) for every part in [0, parts), each in a thread of its own. The caller's thread takes the first; an
// exception of any part is rethrown after all have ended.
template <class F>
void parallel_parts(int64_t parts, const F& fn) {
    if (parts == 1) return fn(int64_t(0));
    std::vector<std::exception_ptr> errors(parts);
    auto guarded = [&](int64_t p) {
        try {
            fn(p);
        } catch (...) {
            errors[p] = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    for (int64_t p = 1; p < parts; ++p) others.emplace_back(guarded, p);
    guarded(0);
    for (auto& t : others) t.join();
    for (auto& e : errors)
        if (e) std::rethrow_exception(e);
}

// Calls fn(begin, end) on `threads` contiguous ranges of blocks that cover [0, n_blocks).
template <class F>
void parallel_blocks(int64_t n_blocks, int threads, const F& fn) {
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n_blocks / 4));
    parallel_parts(parts, [&](int64_t p) { fn(n_blocks * p / parts, n_blocks * (p + 1) / parts); });
}

}  // namespace seme
