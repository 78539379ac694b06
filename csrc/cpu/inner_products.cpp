#include "../parallel.h"
#include "lanes.h"
#include "tile.h"

namespace seme::cpu {
namespace {

template <class C>
struct Body {
    // out[b, i, k] for the blocks in [b0, b1). A tile of all tensors is converted once and then multiplied in pairs.
    static SEME_INLINE void run(const std::vector<View>* tensors, double* out, int64_t b0, int64_t b1) {
        const int64_t count = int64_t(tensors->size()), size = (*tensors)[0].n;
        std::vector<double> tiles(count * kTile);
        std::vector<Lanes> lanes(count * count);
        typename C::T x[kTile];
        for (int64_t b = b0; b < b1; ++b) {
            std::fill(lanes.begin(), lanes.end(), Lanes());
            const int64_t end = std::min(size, (b + 1) * kBlock);
            for (int64_t at = b * kBlock; at < end; at += kTile) {
                const int64_t n = std::min(kTile, end - at), padded = (n + kLanes - 1) / kLanes * kLanes;
                for (int64_t i = 0; i < count; ++i) {
                    load_tile<C>((*tensors)[i], at, n, x);
                    std::fill(x + n, x + padded, 0);
                    double* tile = tiles.data() + i * kTile;
                    for (int64_t j = 0; j < padded; ++j) tile[j] = double(x[j]);
                }
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t k = i; k < count; ++k)
                        lanes[i * count + k].add_products(tiles.data() + i * kTile, tiles.data() + k * kTile, padded);
            }
            double* gram = out + b * count * count;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t k = i; k < count; ++k)
                    gram[i * count + k] = gram[k * count + i] = lanes[i * count + k].fold();
        }
    }
};

}  // namespace

void inner_products(const std::vector<View>& tensors, DType compute, double* out, int threads) {
    parallel_blocks(blocks(tensors[0].n), threads,
                    [&](int64_t b0, int64_t b1) { run_computed<Body>(compute, &tensors, out, b0, b1); });
}

}  // namespace seme::cpu
