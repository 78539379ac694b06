#include "histogram.h"
#include "variance.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;
    using Key = typename C::Key;

    // Adds elements [begin, end) to counts[kColumns].
    static SEME_INLINE void run(const std::vector<View>* tensors, int64_t lowest, int64_t shift, int64_t* counts,
                                int64_t begin, int64_t end) {
        const auto window = Window<C>::make(lowest, int(shift));
        const size_t count = tensors->size() - 1;
        std::vector<T> deltas(count * kTile);
        T base[kTile], v[kTile];
        Key key[kTile];
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_deltas<C>(*tensors, at, n, base, deltas.data());
            variances<C>(deltas.data(), count, n, v);
            for (int64_t j = 0; j < n; ++j) key[j] = C::key(v[j]);
            Bins<C>::count(key, n, window, counts);
        }
    }
};

}  // namespace

void variance_histogram(const std::vector<View>& tensors, int64_t lowest, int64_t shift, DType compute, int64_t* out,
                        int threads) {
    count_in_parallel(tensors[0].n, kColumns, out, threads, [&](int64_t* counts, int64_t begin, int64_t end) {
        run_computed<Body>(compute, &tensors, lowest, shift, counts, begin, end);
    });
}

}  // namespace seme::cpu
