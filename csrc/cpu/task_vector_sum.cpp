#include "../parallel.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

struct Factors {
    const std::vector<double>& weights;
    const std::vector<double>& factors;
    double divisor, scale;
};

template <class C>
struct Body {
    using T = typename C::T;

    static SEME_INLINE void run(const std::vector<View>* tensors, const Factors* factors, const Selected* selected,
                                View out, int64_t b0, int64_t b1) {
        auto keep = keep_from<C>(*selected, b0);
        const T divisor = T(factors->divisor);
        T base[kTile], d[kTile], sum[kTile];
        const int64_t end = std::min(out.n, b1 * kBlock);
        for (int64_t at = b0 * kBlock; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_tile<C>((*tensors)[0], at, n, base);
            for (size_t i = 1; i < tensors->size(); ++i) {
                const T w = T(factors->weights[i - 1]), factor = T(factors->factors[i - 1]);
                load_delta<C>((*tensors)[i], at, n, base, d);
                keep[i - 1].apply(d, base, at, n);
                if (factor != T(1))
                    for (int64_t j = 0; j < n; ++j) d[j] = C::round(d[j] * factor);
                if (i == 1)
                    for (int64_t j = 0; j < n; ++j) sum[j] = TaskVector<C>::term(w, d[j], T(1));
                else
                    for (int64_t j = 0; j < n; ++j) sum[j] += TaskVector<C>::term(w, d[j], T(1));
            }
            if (tensors->size() > 1) {
                for (int64_t j = 0; j < n; ++j) sum[j] = C::round(sum[j]);
                if (divisor != T(1))
                    for (int64_t j = 0; j < n; ++j) sum[j] = C::round(sum[j] / divisor);
                add_scaled<C>(base, sum, n, factors->scale);
            }
            store_tile(base, n, out, at);
        }
    }
};

}  // namespace

void task_vector_sum(const std::vector<View>& tensors, const std::vector<double>& weights,
                     const std::vector<double>& factors, const Selection& selection, double divisor, double scale,
                     DType compute, View out, int threads) {
    const Selected selected(tensors, selection, compute, threads);
    const Factors f{weights, factors, divisor, scale};
    parallel_blocks(blocks(out.n), threads,
                    [&](int64_t b0, int64_t b1) { run_computed<Body>(compute, &tensors, &f, &selected, out, b0, b1); });
}

}  // namespace seme::cpu
