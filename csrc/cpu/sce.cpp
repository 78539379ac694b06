#include "../parallel.h"
#include "variance.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;

    static SEME_INLINE void run(const std::vector<View>* tensors, const std::vector<double>* coefficients,
                                const VarianceCut* cut, View out, int64_t b0, int64_t b1) {
        const size_t count = tensors->size() - 1;
        auto above = cut->template from<C>(b0);
        std::vector<T> deltas(count * kTile);
        T base[kTile], v[kTile], sum[kTile], num[kTile], den[kTile];
        const int64_t end = std::min(out.n, b1 * kBlock);
        for (int64_t at = b0 * kBlock; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_deltas<C>(*tensors, at, n, base, deltas.data());
            if (!cut->everything()) select<C>(above, deltas.data(), count, n, v);
            std::fill(sum, sum + n, T(0));
            for (size_t i = 0; i < count; ++i)
                for (int64_t j = 0; j < n; ++j) sum[j] += deltas[i * kTile + j];
            // Loops of their own: next to a comparison, compilers follow the NaN of a rounding through branches.
            for (int64_t j = 0; j < n; ++j) sum[j] = C::round(sum[j]);
            for (int64_t j = 0; j < n; ++j) sum[j] = Ties<C>::elect(sum[j]);
            std::fill(num, num + n, T(0));
            std::fill(den, den + n, T(0));
            for (size_t i = 0; i < count; ++i) {
                const T* d = deltas.data() + i * kTile;
                const T c = T((*coefficients)[i]);
                for (int64_t j = 0; j < n; ++j) {
                    const T agrees = Ties<C>::agrees(d[j], sum[j]);
                    num[j] += Sce<C>::term(c, d[j]) * agrees;
                    den[j] += c * agrees;
                }
            }
            for (int64_t j = 0; j < n; ++j) base[j] = Sce<C>::finish(base[j], num[j], den[j]);
            store_tile(base, n, out, at);
        }
    }
};

}  // namespace

void sce(const std::vector<View>& tensors, const std::vector<double>& coefficients, int64_t threshold,
         int64_t tie_quota, DType compute, View out, int threads) {
    const VarianceCut cut(tensors, threshold, tie_quota, compute, threads);
    parallel_blocks(blocks(out.n), threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, &coefficients, &cut, out, b0, b1);
    });
}

}  // namespace seme::cpu
