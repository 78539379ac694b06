#include <utility>

#include "../parallel.h"
#include "variance.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;

    // ties[b] = how many variances have the key, for the blocks in [b0, b1).
    static SEME_INLINE void run(const std::vector<View>* tensors, int64_t threshold, int64_t* ties, int64_t b0,
                                int64_t b1) {
        const int64_t size = (*tensors)[0].n;
        const size_t count = tensors->size() - 1;
        std::vector<T> deltas(count * kTile);
        T base[kTile], v[kTile];
        for (int64_t at = b0 * kBlock; at < std::min(size, b1 * kBlock); at += kTile) {
            const int64_t n = std::min(kTile, size - at);
            load_deltas<C>(*tensors, at, n, base, deltas.data());
            variances<C>(deltas.data(), count, n, v);
            ties[at / kBlock] += count_ties<C>(v, n, as_key<C>(threshold));
        }
    }
};

std::vector<int64_t> variance_block_ties(const std::vector<View>& tensors, int64_t threshold, DType compute,
                                         int threads) {
    const int64_t n_blocks = blocks(tensors[0].n);
    std::vector<int64_t> ties(n_blocks);
    parallel_blocks(n_blocks, threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, threshold, ties.data(), b0, b1);
    });
    return ties;
}

}  // namespace

VarianceCut::VarianceCut(const std::vector<View>& tensors, int64_t threshold, int64_t quota, DType compute, int threads)
    : threshold(threshold), quota(quota) {
    if (quota <= 0 || quota >= kUnlimited || threads <= 1) return;  // the cut counts for itself
    ties = variance_block_ties(tensors, threshold, compute, threads);
    int64_t before = 0;
    for (int64_t& t : ties) before += std::exchange(t, before);
}

void variance_ties(const std::vector<View>& tensors, int64_t threshold, DType compute, int64_t* out, int threads) {
    for (int64_t t : variance_block_ties(tensors, threshold, compute, threads)) out[0] += t;
}

}  // namespace seme::cpu
