#include "histogram.h"
#include "importance.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;
    using Keys = Importance<C>;

    // Adds elements [begin, end) to counts[windows, kColumns].
    static SEME_INLINE void run(const std::vector<View>* tensors, const double* factors, int64_t row,
                                const std::vector<int64_t>* lowest, const std::vector<int64_t>* shift, int64_t* counts,
                                int64_t begin, int64_t end) {
        std::vector<Window<Keys>> windows;
        for (size_t i = 0; i < lowest->size(); ++i)
            windows.push_back(Window<Keys>::make((*lowest)[i], int((*shift)[i])));
        T base[kTile], d[kTile], score[kTile];
        typename C::Key key[kTile];
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            importances<C>(*tensors, factors, row, at, n, base, d, score);
            for (int64_t j = 0; j < n; ++j) key[j] = Keys::key(score[j]);
            for (size_t i = 0; i < windows.size(); ++i)
                Bins<Keys>::count(key, n, windows[i], counts + int64_t(i) * kColumns);
        }
    }
};

}  // namespace

void importance_histogram(const std::vector<View>& tensors, const double* factors, int64_t row,
                          const std::vector<int64_t>& lowest, const std::vector<int64_t>& shift, DType compute,
                          int64_t* out, int threads) {
    const int64_t size = int64_t(lowest.size()) * kColumns;
    count_in_parallel(tensors[0].n, size, out, threads, [&](int64_t* counts, int64_t begin, int64_t end) {
        run_computed<Body>(compute, &tensors, factors, row, &lowest, &shift, counts, begin, end);
    });
}

}  // namespace seme::cpu
