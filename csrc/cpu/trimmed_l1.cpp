#include "../parallel.h"
#include "lanes.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    using T = typename C::T;

    // out[b, i] = (sum |d_i|, sum |kept d_i|) for the blocks of `block` elements in [b0, b1).
    static SEME_INLINE void run(const std::vector<View>* tensors, const Selected* selected, int64_t block, double* out,
                                int64_t b0, int64_t b1) {
        const int64_t count = int64_t(tensors->size()) - 1, size = (*tensors)[0].n;
        auto keep = keep_from<C>(*selected, b0);
        T base[kTile], d[kTile];
        double magnitude[kTile], kept[kTile];
        std::vector<Lanes> all_lanes(count), kept_lanes(count);
        for (int64_t b = b0; b < b1; ++b) {
            std::fill(all_lanes.begin(), all_lanes.end(), Lanes());
            std::fill(kept_lanes.begin(), kept_lanes.end(), Lanes());
            const int64_t end = std::min(size, (b + 1) * block);
            for (int64_t at = b * block; at < end; at += kTile) {
                const int64_t n = std::min(kTile, end - at), padded = (n + kLanes - 1) / kLanes * kLanes;
                load_tile<C>((*tensors)[0], at, n, base);
                for (int64_t i = 0; i < count; ++i) {
                    load_delta<C>((*tensors)[i + 1], at, n, base, d);
                    std::fill(d + n, d + padded, T(0));
                    for (int64_t j = 0; j < padded; ++j) magnitude[j] = double(std::abs(d[j]));
                    keep[i].apply(d, base, at, n);
                    for (int64_t j = 0; j < padded; ++j) kept[j] = double(std::abs(d[j]));
                    all_lanes[i].add(magnitude, padded);
                    kept_lanes[i].add(kept, padded);
                }
            }
            for (int64_t i = 0; i < count; ++i) {
                out[(b * count + i) * 2] = all_lanes[i].fold();
                out[(b * count + i) * 2 + 1] = kept_lanes[i].fold();
            }
        }
    }
};

}  // namespace

void trimmed_l1(const std::vector<View>& tensors, const Selection& selection, DType compute, double* out, int threads) {
    const Selected selected(tensors, selection, compute, threads);
    const int64_t block = selection.row > 0 ? selection.row : kBlock;
    parallel_blocks((tensors[0].n + block - 1) / block, threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, &selected, block, out, b0, b1);
    });
}

}  // namespace seme::cpu
