// What the CPU kernels of SCE share: the variance of each element over the task vectors, and a selection by it.
#pragma once

#include "deltas.h"

namespace seme::cpu {

// v[0..n) = the variance over `count` task vectors in rows of kTile.
template <class C>
SEME_INLINE void variances(const typename C::T* deltas, size_t count, int64_t n, typename C::T* v) {
    using F = Variance<C>;
    double sum[kTile], squares[kTile];
    std::fill(sum, sum + n, 0.0);
    std::fill(squares, squares + n, 0.0);
    for (size_t i = 1; i < count; ++i)
        for (int64_t j = 0; j < n; ++j) {
            const double e = F::deviation(deltas[i * kTile + j], deltas[j]);
            sum[j] += e;
            squares[j] += e * e;
        }
    for (int64_t j = 0; j < n; ++j) v[j] = F::finish(sum[j], squares[j], double(count));
}

// The positions whose variance is above the threshold, and the first ties with it, as a Cut of the variance.
struct VarianceCut {
    VarianceCut(const std::vector<View>& tensors, int64_t threshold, int64_t quota, DType compute, int threads);

    int64_t threshold, quota;
    std::vector<int64_t> ties;  // in the blocks before each; empty if the call needs none

    bool everything() const { return threshold == 0 && quota >= kUnlimited; }

    template <class C>
    Cut<C> from(int64_t block) const {
        return {as_key<C>(threshold), quota >= kUnlimited || ties.empty() ? quota : quota - ties[block]};
    }
};

// Zeros what the cut leaves out of deltas[count][0..n). `v` is working memory.
template <class C>
SEME_INLINE void select(Cut<C>& cut, typename C::T* deltas, size_t count, int64_t n, typename C::T* v) {
    using T = typename C::T;
    typename C::Key key[kTile];
    variances<C>(deltas, count, n, v);
    cut.keep(v, n);  // a variance of 0 is never selected, so 0 says what is not
    for (int64_t j = 0; j < n; ++j) key[j] = C::key(v[j]);
    for (size_t i = 0; i < count; ++i) {
        T* d = deltas + i * kTile;
        for (int64_t j = 0; j < n; ++j) d[j] = keep_if(key[j] > 0, d[j]);
    }
}

}  // namespace seme::cpu
