#include "../parallel.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

struct Factors {
    const std::vector<double>& weights;
    const std::vector<double>& factors;
    bool normalize;
    double scale;
};

template <class C>
struct Body {
    using T = typename C::T;
    using F = Ties<C>;

    // A loop of its own: next to a comparison, compilers follow the NaN of a rounding through branches.
    static SEME_INLINE void round(T* x, int64_t n) {
        for (int64_t j = 0; j < n; ++j) x[j] = C::round(x[j]);
    }

    static SEME_INLINE void run(const std::vector<View>* tensors, const Factors* factors, const Selected* selected,
                                View out, int64_t b0, int64_t b1) {
        const size_t count = tensors->size() - 1;
        auto keep = keep_from<C>(*selected, b0);
        std::vector<T> terms(count * kTile);
        T base[kTile], sum[kTile], num[kTile], den[kTile];
        const int64_t end = std::min(out.n, b1 * kBlock);
        for (int64_t at = b0 * kBlock; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_tile<C>((*tensors)[0], at, n, base);
            std::fill(sum, sum + n, T(0));
            for (size_t i = 0; i < count; ++i) {
                T* term = terms.data() + i * kTile;
                load_delta<C>((*tensors)[i + 1], at, n, base, term);
                keep[i].apply(term, base, at, n);
                const T w = T(factors->weights[i]), factor = T(factors->factors[i]);
                if (factor == T(1))
                    for (int64_t j = 0; j < n; ++j) sum[j] += term[j] = TaskVector<C>::term(w, term[j], T(1));
                else
                    for (int64_t j = 0; j < n; ++j) sum[j] += term[j] = TaskVector<C>::term(w, term[j], factor);
            }
            round(sum, n);
            for (int64_t j = 0; j < n; ++j) sum[j] = F::elect(sum[j]);
            std::fill(num, num + n, T(0));
            std::fill(den, den + n, T(0));
            for (size_t i = 0; i < count; ++i) {
                const T* term = terms.data() + i * kTile;
                const T w = T(factors->weights[i]);
                for (int64_t j = 0; j < n; ++j) {
                    const T agrees = F::agrees(term[j], sum[j]);
                    num[j] += term[j] * agrees;
                    den[j] += w * agrees;
                }
            }
            if (count > 0) {
                round(num, n);
                if (factors->normalize) {
                    round(den, n);
                    for (int64_t j = 0; j < n; ++j) num[j] = F::mean(num[j], den[j]);
                }
                add_scaled<C>(base, num, n, factors->scale);
            }
            store_tile(base, n, out, at);
        }
    }
};

}  // namespace

void ties(const std::vector<View>& tensors, const std::vector<double>& weights, const std::vector<double>& factors,
          const Selection& selection, bool normalize, double scale, DType compute, View out, int threads) {
    const Selected selected(tensors, selection, compute, threads);
    const Factors f{weights, factors, normalize, scale};
    parallel_blocks(blocks(out.n), threads,
                    [&](int64_t b0, int64_t b1) { run_computed<Body>(compute, &tensors, &f, &selected, out, b0, b1); });
}

}  // namespace seme::cpu
