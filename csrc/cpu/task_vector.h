// What the CPU kernels on task vectors share. Their tensors[0] is the base.
#pragma once

#include <algorithm>

#include "../formulas.h"
#include "draws.h"

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

// x if `first`, else y; by their bits, for the reason that keep_if gives.
template <class T>
SEME_INLINE T choose(bool first, T x, T y) {
    using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    return bit_cast<T>(bit_cast<Bits>(keep_if(first, x)) | bit_cast<Bits>(keep_if(!first, y)));
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

// The selection of a call, and where its quotas stand at the beginning of any block.
struct Selected {
    Selected(const std::vector<View>& tensors, const Selection& selection, DType compute, int threads);

    const Selection& selection;
    const size_t count;          // of task vectors
    std::vector<int64_t> ties;   // [blocks, thresholds]: ties in the blocks before; empty if the call needs none
    std::vector<uint8_t> masks;  // [n, elements], see ranks.h; empty without spreads

    int64_t quota(size_t i, int64_t block) const {
        const int64_t quota = selection.quotas[i];
        return quota >= kUnlimited || ties.empty() ? quota : quota - ties[block * selection.quotas.size() + i];
    }
};

// A cut through the magnitudes of one task vector, tile after tile: what lies above it are keys above the threshold,
// and the first ties with it.
template <class C>
struct Cut {
    using T = typename C::T;
    using Key = typename C::Key;
    Key threshold;
    int64_t quota;

    // d = 0 where the element does not lie above.
    SEME_INLINE void keep(T* d, int64_t n) {
        const Key last = part(d, n, threshold - 1, [](T& x, bool above) SEME_LAMBDA { x = above ? x : T(0); });
        if (last >= 0)
            for (int64_t j = 0; j < n; ++j) d[j] = keep_if(C::key(d[j]) > last, d[j]);
    }

    // d = 0 where the element lies above.
    SEME_INLINE void drop(T* d, int64_t n) {
        const Key last = part(d, n, threshold, [](T& x, bool above) SEME_LAMBDA { x = above ? T(0) : x; });
        for (int64_t j = 0; j < n; ++j) d[j] = keep_if(C::key(d[j]) <= last, d[j]);
    }

  private:
    // Keys after the returned one lie above. In the one tile where the quota ends the ties are dealt with one by one,
    // and `dealt` is returned.
    template <class F>
    SEME_INLINE Key part(T* d, int64_t n, Key dealt, const F& tie) {
        if (quota <= 0) return threshold;
        if (quota < kUnlimited) {
            const int64_t ties = count_ties<C>(d, n, threshold);
            if (ties > quota) {
                for (int64_t j = 0; j < n; ++j)
                    if (C::key(d[j]) == threshold) tie(d[j], quota-- > 0);
                quota = 0;
                return dealt;
            }
            quota -= ties;
        }
        return threshold - 1;
    }
};

// What is kept of one task vector, tile after tile.
template <class C>
struct Keep {
    using T = typename C::T;
    std::vector<Cut<C>> cuts;  // the first keeps what lies above it, the second drops it
    int64_t chance = kCertain, offset = 0;
    uint64_t key = 0;
    const uint8_t* mask = nullptr;  // of what is kept by rank: what is not equals the base

    // d = 0 where the element is not kept, of the n elements from place `at` on.
    SEME_INLINE void apply(T* d, const T* base, int64_t at, int64_t n) {
        if (mask != nullptr)
            for (int64_t j = 0; j < n; ++j) d[j] = choose(mask[at + j] != 0, d[j], base[j] - base[j]);
        if (cuts.size() > 0) cuts[0].keep(d, n);
        if (cuts.size() > 1) cuts[1].drop(d, n);
        if (chance < kCertain) draw(d, offset + at, n);
    }

  private:
    SEME_INLINE void draw(T* d, int64_t e, int64_t n) const {
        int32_t memory[kDraws];
        const int32_t* upper = upper_halves(key, e, n, memory);
        const int32_t bound = int32_t(chance >> 16);
        int32_t open = 0;
        for (int64_t j = 0; j < n; ++j) {
            d[j] = keep_if(upper[j] <= bound, d[j]);
            open += upper[j] == bound;
        }
        if (open > 0)
            for (int64_t j = 0; j < n; ++j)
                if (upper[j] == bound && !is_drawn(bound, chance, key, e + j)) d[j] = T(0);
    }
};

// What is kept of every task vector from a block on.
template <class C>
std::vector<Keep<C>> keep_from(const Selected& selected, int64_t block) {
    std::vector<Keep<C>> keep(selected.count);
    const auto& thresholds = selected.selection.thresholds;
    for (size_t i = 0; i < thresholds.size(); ++i)
        keep[i % selected.count].cuts.push_back({as_key<C>(thresholds[i]), selected.quota(i, block)});
    for (size_t i = 0; i < selected.selection.chances.size(); ++i) {
        keep[i].chance = selected.selection.chances[i];
        keep[i].key = uint64_t(selected.selection.seeds[i]);
        keep[i].offset = selected.selection.offset;
    }
    for (size_t i = 0; i < selected.selection.spreads.size(); ++i)
        if (selected.selection.spreads[i] > 0) {
            keep[i].chance = kCertain;
            keep[i].mask = selected.masks.data() + i * (selected.masks.size() / selected.count);
        }
    return keep;
}

// Ties of every block with the thresholds, [blocks, thresholds].
std::vector<int64_t> block_ties(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, DType compute,
                                int threads);

}  // namespace seme::cpu
