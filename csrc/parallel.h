// Work divided over threads by whole blocks. What an element's value is never depends on the division.
#pragma once

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

#include "seme.h"

namespace seme {

// Calls fn(begin, end) on `threads` contiguous ranges of blocks that cover [0, n_blocks). The caller's
// thread takes one of them; an exception of any range is rethrown after all have ended.
template <class F>
void parallel_blocks(int64_t n_blocks, int threads, const F& fn) {
    int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n_blocks / 4));
    if (parts == 1) return fn(int64_t(0), n_blocks);
    std::vector<std::exception_ptr> errors(parts);
    auto part = [&](int64_t p) {
        try {
            fn(n_blocks * p / parts, n_blocks * (p + 1) / parts);
        } catch (...) {
            errors[p] = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    for (int64_t p = 1; p < parts; ++p) others.emplace_back(part, p);
    part(0);
    for (auto& t : others) t.join();
    for (auto& e : errors)
        if (e) std::rethrow_exception(e);
}

}  // namespace seme
