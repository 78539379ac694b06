#include "../parallel.h"
#include "importance.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;

    static SEME_INLINE void run(const std::vector<View>* tensors, const double* factors, int64_t row, double threshold,
                                View out, int64_t b0, int64_t b1) {
        T base[kTile], d[kTile], score[kTile];
        const T least = T(threshold);
        const int64_t end = std::min(out.n, b1 * kBlock);
        for (int64_t at = b0 * kBlock; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            importances<C>(*tensors, factors, row, at, n, base, d, score);
            for (int64_t j = 0; j < n; ++j) base[j] = Importance<C>::finish(base[j], d[j], score[j], least);
            store_tile(base, n, out, at);
        }
    }
};

}  // namespace

void importance_fusion(const std::vector<View>& tensors, const double* factors, int64_t row, double threshold,
                       DType compute, View out, int threads) {
    parallel_blocks(blocks(out.n), threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, factors, row, threshold, out, b0, b1);
    });
}

}  // namespace seme::cpu
