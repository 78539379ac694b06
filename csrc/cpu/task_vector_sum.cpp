#include "../parallel.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;

    static SEME_INLINE void run(const std::vector<View>* tensors, const double* weights, double divisor, double scale,
                                View out, int64_t begin, int64_t end) {
        T base[kTile], d[kTile], sum[kTile];
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_tile<C>((*tensors)[0], at, n, base);
            for (size_t i = 1; i < tensors->size(); ++i) {
                const T w = T(weights[i - 1]);
                load_delta<C>((*tensors)[i], at, n, base, d);
                if (i == 1)
                    for (int64_t j = 0; j < n; ++j) sum[j] = TaskVectorSum<C>::term(w, d[j]);
                else
                    for (int64_t j = 0; j < n; ++j) sum[j] += TaskVectorSum<C>::term(w, d[j]);
            }
            if (tensors->size() > 1) {
                for (int64_t j = 0; j < n; ++j) sum[j] = C::round(sum[j]);
                if (divisor != 1.0)
                    for (int64_t j = 0; j < n; ++j) sum[j] = C::round(sum[j] / T(divisor));
                add_scaled<C>(base, sum, n, scale);
            }
            store_tile(base, n, out, at);
        }
    }
};

}  // namespace

void task_vector_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, double scale,
                     DType compute, View out, int threads) {
    parallel_blocks(blocks(out.n), threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, weights.data(), divisor, scale, out, b0 * kBlock,
                           std::min(out.n, b1 * kBlock));
    });
}

}  // namespace seme::cpu
