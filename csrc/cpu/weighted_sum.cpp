#include "../formulas.h"
#include "../parallel.h"
#include "tile.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;
    using F = WeightedSum<C>;

    static SEME_INLINE void run(const std::vector<View>* tensors, const double* weights, double divisor, View out,
                                int64_t begin, int64_t end) {
        T sum[kTile], x[kTile];
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            for (size_t i = 0; i < tensors->size(); ++i) {
                load_tile<C>((*tensors)[i], at, n, x);
                const T w = T(weights[i]);
                if (i == 0)
                    for (int64_t j = 0; j < n; ++j) sum[j] = F::first(w, x[j]);
                else
                    for (int64_t j = 0; j < n; ++j) sum[j] = F::add(sum[j], w, x[j]);
            }
            for (int64_t j = 0; j < n; ++j) sum[j] = F::finish(sum[j], T(divisor));
            store_tile(sum, n, out, at);
        }
    }
};

}  // namespace

void weighted_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, DType compute,
                  View out, int threads) {
    parallel_blocks(blocks(out.n), threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, weights.data(), divisor, out, b0 * kBlock, std::min(out.n, b1 * kBlock));
    });
}

}  // namespace seme::cpu
