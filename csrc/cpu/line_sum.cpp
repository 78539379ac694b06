#include "../parallel.h"
#include "../weights.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;

    // Adds elements x[0..n), of which j has the weight w(j), to sum[0..n).
    template <class W>
    static SEME_INLINE void add(const T* x, int64_t n, bool relative, W w, T* sum) {
        if (relative)
            for (int64_t j = 0; j < n; ++j) sum[j] += LineSum<C>::relative_term(w(j), x[j]);
        else
            for (int64_t j = 0; j < n; ++j) sum[j] += LineSum<C>::term(w(j), x[j]);
    }

    static SEME_INLINE void run(const std::vector<View>* tensors, bool relative, const Weights* weights, View out,
                                int64_t begin, int64_t end) {
        T base[kTile], x[kTile], sum[kTile];
        const int64_t skipped = relative;
        for (int64_t at = begin, n; at < end; at += n) {
            n = std::min({kTile, end - at, weights->run(at)});
            if (relative) load_tile<C>((*tensors)[0], at, n, base);
            std::fill(sum, sum + n, T(0));
            for (int64_t i = 0; i < weights->count; ++i) {
                if (relative)
                    load_delta<C>((*tensors)[i + skipped], at, n, base, x);
                else
                    load_tile<C>((*tensors)[i], at, n, x);
                const double* each = weights->of(i, at);
                const T one = T(*each);
                if (weights->columns > 0)
                    add(x, n, relative, [=](int64_t j) SEME_LAMBDA { return T(each[j]); }, sum);
                else
                    add(x, n, relative, [=](int64_t) SEME_LAMBDA { return one; }, sum);
            }
            for (int64_t j = 0; j < n; ++j) sum[j] = C::round(sum[j]);
            if (relative)
                for (int64_t j = 0; j < n; ++j) sum[j] = TaskVector<C>::add(base[j], sum[j]);
            store_tile(sum, n, out, at);
        }
    }
};

}  // namespace

void line_sum(const std::vector<View>& tensors, bool relative, const Weights& weights, DType compute, View out,
              int threads) {
    parallel_blocks(blocks(out.n), threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, relative, &weights, out, b0 * kBlock, std::min(out.n, b1 * kBlock));
    });
}

}  // namespace seme::cpu
