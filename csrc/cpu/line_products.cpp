#include "../parallel.h"
#include "lanes.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

// A tile of every tensor, or of its difference from the first, in float64.
template <class C>
struct Tiles {
    using T = typename C::T;
    const std::vector<View>& tensors;
    const int64_t skipped, count;
    std::vector<double> values;

    SEME_INLINE Tiles(const std::vector<View>& tensors, bool relative)
        : tensors(tensors), skipped(relative), count(int64_t(tensors.size()) - skipped), values(count * kTile) {}

    SEME_INLINE const double* operator[](int64_t i) const { return values.data() + i * kTile; }

    SEME_INLINE void load(int64_t at, int64_t n, int64_t padded) {
        T base[kTile], x[kTile];
        if (skipped) load_tile<C>(tensors[0], at, n, base);
        for (int64_t i = 0; i < count; ++i) {
            if (skipped)
                load_delta<C>(tensors[i + 1], at, n, base, x);
            else
                load_tile<C>(tensors[i], at, n, x);
            std::fill(x + n, x + padded, 0);
            double* tile = values.data() + i * kTile;
            for (int64_t j = 0; j < padded; ++j) tile[j] = double(x[j]);
        }
    }
};

template <class C>
struct Body {
    // out[b, i, k] for the blocks of `block` elements in [b0, b1). A tile of all tensors is converted once and then
    // multiplied in pairs.
    static SEME_INLINE void run(const std::vector<View>* tensors, bool relative, int64_t block, double* out, int64_t b0,
                                int64_t b1) {
        Tiles<C> tiles(*tensors, relative);
        const int64_t count = tiles.count, size = (*tensors)[0].n;
        std::vector<Lanes> lanes(count * count);
        for (int64_t b = b0; b < b1; ++b) {
            std::fill(lanes.begin(), lanes.end(), Lanes());
            const int64_t end = std::min(size, (b + 1) * block);
            for (int64_t at = b * block; at < end; at += kTile) {
                const int64_t n = std::min(kTile, end - at), padded = (n + kLanes - 1) / kLanes * kLanes;
                tiles.load(at, n, padded);
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t k = i; k < count; ++k) lanes[i * count + k].add_products(tiles[i], tiles[k], padded);
            }
            double* gram = out + b * count * count;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t k = i; k < count; ++k)
                    gram[i * count + k] = gram[k * count + i] = lanes[i * count + k].fold();
        }
    }
};

template <class C>
struct ColumnBody {
    // out[b, i, k, column] for the blocks in [b0, b1), rows added from the first to the last.
    static SEME_INLINE void run(const std::vector<View>* tensors, bool relative, int64_t block, int64_t columns,
                                double* out, int64_t b0, int64_t b1) {
        Tiles<C> tiles(*tensors, relative);
        const int64_t count = tiles.count, size = (*tensors)[0].n;
        for (int64_t b = b0; b < b1; ++b) {
            double* gram = out + b * count * count * columns;
            std::fill(gram, gram + count * count * columns, 0.0);
            const int64_t end = std::min(size, (b + 1) * block);
            for (int64_t at = b * block, n; at < end; at += n) {
                const int64_t column = at % columns;
                n = std::min({kTile, end - at, columns - column});
                tiles.load(at, n, n);
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t k = i; k < count; ++k) {
                        const double *x = tiles[i], *y = tiles[k];
                        double* sum = gram + (i * count + k) * columns + column;
                        for (int64_t j = 0; j < n; ++j) sum[j] += x[j] * y[j];
                    }
            }
            for (int64_t i = 0; i < count; ++i)
                for (int64_t k = 0; k < i; ++k)
                    std::copy_n(gram + (k * count + i) * columns, columns, gram + (i * count + k) * columns);
        }
    }
};

}  // namespace

void line_products(const std::vector<View>& tensors, bool relative, int64_t block, int64_t columns, DType compute,
                   double* out, int threads) {
    const int64_t n_blocks = (tensors[0].n + block - 1) / block;
    parallel_blocks(n_blocks, threads, [&](int64_t b0, int64_t b1) {
        if (columns > 0)
            run_computed<ColumnBody>(compute, &tensors, relative, block, columns, out, b0, b1);
        else
            run_computed<Body>(compute, &tensors, relative, block, out, b0, b1);
    });
}

}  // namespace seme::cpu
