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
        T sum[kTile];
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            for (size_t i = 0; i < tensors->size(); ++i) {
                const T w = T(weights[i]);
                if (i == 0)
                    load_each<C>((*tensors)[i], at, n, [&](int64_t j, T x) SEME_LAMBDA { sum[j] = F::first(w, x); });
                else
                    load_each<C>((*tensors)[i], at, n,
                                 [&](int64_t j, T x) SEME_LAMBDA { sum[j] = F::add(sum[j], w, x); });
            }
            const T d = T(divisor);
            for (int64_t j = 0; j < n && d != T(1); ++j) sum[j] = sum[j] / d;
            store_each(out, at, n, [&](int64_t j) SEME_LAMBDA { return F::finish(sum[j], T(1)); });
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
