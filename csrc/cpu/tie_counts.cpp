#include <utility>

#include "../parallel.h"
#include "ranks.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;

    static SEME_INLINE void run(const std::vector<View>* tensors, const std::vector<int64_t>* thresholds, int64_t* ties,
                                int64_t b0, int64_t b1) {
        const int64_t count = int64_t(tensors->size()) - 1, size = (*tensors)[0].n, all = int64_t(thresholds->size());
        T base[kTile], d[kTile];
        for (int64_t at = b0 * kBlock; at < std::min(size, b1 * kBlock); at += kTile) {
            const int64_t n = std::min(kTile, size - at);
            load_tile<C>((*tensors)[0], at, n, base);
            for (int64_t i = 0; i < count; ++i) {
                load_delta<C>((*tensors)[i + 1], at, n, base, d);
                for (int64_t t = i; t < all; t += count)
                    ties[at / kBlock * all + t] += count_ties<C>(d, n, as_key<C>((*thresholds)[t]));
            }
        }
    }
};

}  // namespace

std::vector<int64_t> block_ties(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, DType compute,
                                int threads) {
    const int64_t n_blocks = blocks(tensors[0].n);
    std::vector<int64_t> ties(n_blocks * thresholds.size());
    parallel_blocks(n_blocks, threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, &thresholds, ties.data(), b0, b1);
    });
    return ties;
}

Selected::Selected(const std::vector<View>& tensors, const Selection& selection, DType compute, int threads)
    : selection(selection), count(tensors.size() - 1) {
    if (selection.row > 0) masks = rank_masks(tensors, selection, compute, threads);
    const auto& quotas = selection.quotas;
    const bool binding = std::any_of(quotas.begin(), quotas.end(), [](int64_t q) { return q > 0 && q < kUnlimited; });
    if (!binding || threads <= 1) return;  // one range from the first block on: the cuts count for themselves
    ties = block_ties(tensors, selection.thresholds, compute, threads);
    std::vector<int64_t> before(quotas.size());
    for (size_t at = 0; at < ties.size(); ++at) {
        int64_t& sum = before[at % before.size()];
        sum += std::exchange(ties[at], sum);
    }
}

void tie_counts(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, DType compute, int64_t* out,
                int threads) {
    const auto ties = block_ties(tensors, thresholds, compute, threads);
    for (size_t at = 0; at < ties.size(); ++at) out[at % thresholds.size()] += ties[at];
}

}  // namespace seme::cpu
