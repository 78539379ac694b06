#include "histogram.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;
    using Key = typename C::Key;

    // Adds elements [begin, end) to counts[task vectors, kColumns].
    static SEME_INLINE void run(const std::vector<View>* tensors, const int64_t* lowest, const int64_t* shift,
                                int64_t* counts, int64_t begin, int64_t end) {
        std::vector<Window<C>> windows;
        for (size_t i = 0; i + 1 < tensors->size(); ++i) windows.push_back(Window<C>::make(lowest[i], int(shift[i])));
        T base[kTile], d[kTile];
        Key key[kTile];
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_tile<C>((*tensors)[0], at, n, base);
            for (size_t i = 0; i < windows.size(); ++i) {
                load_delta<C>((*tensors)[i + 1], at, n, base, d);
                for (int64_t j = 0; j < n; ++j) key[j] = C::key(d[j]);
                Bins<C>::count(key, n, windows[i], counts + int64_t(i) * kColumns);
            }
        }
    }
};

}  // namespace

void magnitude_histogram(const std::vector<View>& tensors, const std::vector<int64_t>& lowest,
                         const std::vector<int64_t>& shift, DType compute, int64_t* out, int threads) {
    const int64_t size = int64_t(lowest.size()) * kColumns;
    count_in_parallel(tensors[0].n, size, out, threads, [&](int64_t* counts, int64_t begin, int64_t end) {
        run_computed<Body>(compute, &tensors, lowest.data(), shift.data(), counts, begin, end);
    });
}

}  // namespace seme::cpu
