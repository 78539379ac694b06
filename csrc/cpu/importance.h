// The importance of the elements of a tile: what the CPU kernels of Arcee Fusion share.
#pragma once

#include "task_vector.h"

namespace seme::cpu {

// base, d and score [0..n) of the elements from `at` on. factors: one per row of `row` elements.
template <class C>
SEME_INLINE void importances(const std::vector<View>& tensors, const double* factors, int64_t row, int64_t at,
                             int64_t n, typename C::T* base, typename C::T* d, typename C::T* score) {
    using T = typename C::T;
    load_tile<C>(tensors[0], at, n, base);
    load_delta<C>(tensors[1], at, n, base, d);
    for (int64_t begin = 0, end; begin < n; begin = end) {
        const int64_t r = (at + begin) / row;
        end = std::min(n, (r + 1) * row - at);
        const T factor = C::round(T(factors[r]));
        for (int64_t j = begin; j < end; ++j) score[j] = Importance<C>::score(d[j], factor);
    }
}

}  // namespace seme::cpu
