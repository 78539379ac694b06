// What the CPU kernels on task vectors share. Their tensors[0] is the base.
#pragma once

#include <algorithm>

#include "../formulas.h"
#include "tile.h"

namespace seme::cpu {

// d[0..n) = elements [at, at + n) of v, minus the base.
template <class C>
SEME_INLINE void load_delta(const View& v, int64_t at, int64_t n, const typename C::T* base, typename C::T* d) {
    using T = typename C::T;
    load_each<C>(v, at, n, [=](int64_t j, T x) SEME_LAMBDA { d[j] = TaskVector<C>::delta(x, base[j]); });
}

// base[0..n) += scale * s, the last step of a merge. The steps have a loop each: compilers do not hoist the
// tests for 1 out of a longer one.
template <class C>
SEME_INLINE void add_scaled(typename C::T* base, typename C::T* s, int64_t n, double scale) {
    using T = typename C::T;
    if (scale != 1.0)
        for (int64_t j = 0; j < n; ++j) s[j] = C::round(s[j] * T(scale));
    for (int64_t j = 0; j < n; ++j) base[j] = TaskVector<C>::add(base[j], s[j]);
}

// How many of d[0..n) have the key `tie`.
template <class C>
SEME_INLINE int64_t count_ties(const typename C::T* d, int64_t n, typename C::Key tie) {
    typename C::Key found = 0;
    for (int64_t j = 0; j < n; ++j) found += C::key(d[j]) == tie;
    return found;
}

// A threshold as a key: one beyond all keys becomes the first that no element has, one below 0 becomes -1.
template <class C>
typename C::Key as_key(int64_t threshold) {
    return typename C::Key(std::clamp<int64_t>(threshold, -1, int64_t(C::kGreatestKey) + 1));
}

constexpr int64_t kUnlimited = int64_t(1) << 62;  // a tie quota from here on keeps every tie

// Thresholds and quotas of the task vectors, and where they stand at the beginning of any block.
struct Cuts {
    Cuts(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, const std::vector<int64_t>& quotas,
         DType compute, int threads);

    const std::vector<int64_t>& thresholds;
    const std::vector<int64_t>& quotas;
    std::vector<int64_t> ties;  // [blocks, task vectors]: ties in the blocks before; empty if the call needs none

    int64_t quota(size_t i, int64_t block) const {
        if (quotas[i] >= kUnlimited || ties.empty()) return quotas[i];
        return quotas[i] - ties[block * quotas.size() + i];
    }
};

// The trim of one task vector, tile after tile: keys above the threshold stay, and the first ties with it.
template <class C>
struct Trim {
    using T = typename C::T;
    using Key = typename C::Key;
    Key threshold;
    int64_t quota;

    // Elements whose key is above the returned one are kept. In the one tile where the quota ends, the ties
    // that are not kept are set to 0 in d.
    SEME_INLINE Key next(T* d, int64_t n) {
        if (quota <= 0) return threshold;
        if (quota < kUnlimited) {
            const int64_t ties = count_ties<C>(d, n, threshold);
            if (ties > quota) {
                for (int64_t j = 0; j < n; ++j)
                    if (C::key(d[j]) == threshold && quota-- <= 0) d[j] = T(0);
                quota = 0;
            } else {
                quota -= ties;
            }
        }
        return threshold - 1;
    }
};

// Trims of all task vectors from a block on.
template <class C>
std::vector<Trim<C>> trims_from(const Cuts& cuts, int64_t block) {
    std::vector<Trim<C>> trims;
    for (size_t i = 0; i < cuts.quotas.size(); ++i)
        trims.push_back({as_key<C>(cuts.thresholds[i]), cuts.quota(i, block)});
    return trims;
}

// Ties of every block with the thresholds, [blocks, task vectors].
std::vector<int64_t> block_ties(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, DType compute,
                                int threads);

}  // namespace seme::cpu
