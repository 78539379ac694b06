#include "../parallel.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;
    using F = NearSwap<C>;

    // Loops of their own: next to a comparison, compilers follow the NaN of a rounding through branches.
    static SEME_INLINE void run(const std::vector<View>* tensors, double t, double least, View out, int64_t begin,
                                int64_t end) {
        T a[kTile], b[kTile], share[kTile];
        const T most = T(t), smallest = T(least);
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_tile<C>((*tensors)[0], at, n, a);
            load_tile<C>((*tensors)[1], at, n, b);
            for (int64_t j = 0; j < n; ++j) share[j] = F::distance(a[j], b[j]);
            for (int64_t j = 0; j < n; ++j) share[j] = F::at_least(share[j], smallest);
            for (int64_t j = 0; j < n; ++j) share[j] = F::share(share[j], most);
            for (int64_t j = 0; j < n; ++j) share[j] = F::clamp(share[j]);
            for (int64_t j = 0; j < n; ++j) a[j] = F::mix(a[j], b[j], share[j]);
            store_tile(a, n, out, at);
        }
    }
};

}  // namespace

void nearswap(const std::vector<View>& tensors, double t, double least, DType compute, View out, int threads) {
    parallel_blocks(blocks(out.n), threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, t, least, out, b0 * kBlock, std::min(out.n, b1 * kBlock));
    });
}

}  // namespace seme::cpu
