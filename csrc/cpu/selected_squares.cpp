#include "../parallel.h"
#include "lanes.h"
#include "variance.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;

    // out[b, i] = sum of the squares of the selected d_i for the blocks in [b0, b1).
    static SEME_INLINE void run(const std::vector<View>* tensors, const VarianceCut* cut, double* out, int64_t b0,
                                int64_t b1) {
        const size_t count = tensors->size() - 1;
        const int64_t size = (*tensors)[0].n;
        auto above = cut->template from<C>(b0);
        std::vector<T> deltas(count * kTile);
        T base[kTile], v[kTile];
        double square[kTile];
        std::vector<Lanes> lanes(count);
        for (int64_t b = b0; b < b1; ++b) {
            std::fill(lanes.begin(), lanes.end(), Lanes());
            const int64_t end = std::min(size, (b + 1) * kBlock);
            for (int64_t at = b * kBlock; at < end; at += kTile) {
                const int64_t n = std::min(kTile, end - at), padded = (n + kLanes - 1) / kLanes * kLanes;
                load_deltas<C>(*tensors, at, n, base, deltas.data());
                if (!cut->everything()) select<C>(above, deltas.data(), count, n, v);
                for (size_t i = 0; i < count; ++i) {
                    T* d = deltas.data() + i * kTile;
                    for (int64_t j = 0; j < n; ++j) d[j] = Sce<C>::square(d[j]);
                    for (int64_t j = 0; j < n; ++j) square[j] = double(d[j]);  // apart, or neither is done in vectors
                    std::fill(square + n, square + padded, 0.0);
                    lanes[i].add(square, padded);
                }
            }
            for (size_t i = 0; i < count; ++i) out[b * int64_t(count) + int64_t(i)] = lanes[i].fold();
        }
    }
};

}  // namespace

void selected_squares(const std::vector<View>& tensors, int64_t threshold, int64_t tie_quota, DType compute,
                      double* out, int threads) {
    const VarianceCut cut(tensors, threshold, tie_quota, compute, threads);
    parallel_blocks(blocks(tensors[0].n), threads,
                    [&](int64_t b0, int64_t b1) { run_computed<Body>(compute, &tensors, &cut, out, b0, b1); });
}

}  // namespace seme::cpu
