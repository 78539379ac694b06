// All task vectors of a tile at once, for kernels whose formula needs them together.
#pragma once

#include "task_vector.h"

namespace seme::cpu {

// base[0..n) and, in rows of kTile, deltas[task vectors][0..n) of the elements from `at` on.
template <class C>
SEME_INLINE void load_deltas(const std::vector<View>& tensors, int64_t at, int64_t n, typename C::T* base,
                             typename C::T* deltas) {
    load_tile<C>(tensors[0], at, n, base);
    for (size_t i = 1; i < tensors.size(); ++i) load_delta<C>(tensors[i], at, n, base, deltas + (i - 1) * kTile);
}

}  // namespace seme::cpu
