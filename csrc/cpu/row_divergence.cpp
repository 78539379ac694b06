#include <limits>

#include "../parallel.h"
#include "elementary.h"
#include "lanes.h"
#include "tile.h"

namespace seme::cpu {
namespace {

constexpr double kEpsilon = 1e-8;

template <class C>
struct Body {
    using T = typename C::T;

    // e[0..row) = e^(x - max x) for a row of v, and their sum.
    static SEME_INLINE double exponentials(const View& v, int64_t at, int64_t row, double* e) {
        constexpr int64_t kWidth = 16;
        T greatest[kWidth], x[kTile];
        std::fill(greatest, greatest + kWidth, -std::numeric_limits<T>::infinity());
        for (int64_t begin = 0; begin < row; begin += kTile) {
            const int64_t n = std::min(kTile, row - begin), padded = (n + kWidth - 1) / kWidth * kWidth;
            load_tile<C>(v, at + begin, n, x);
            for (int64_t j = 0; j < n; ++j) e[begin + j] = double(x[j]);
            std::fill(x + n, x + padded, -std::numeric_limits<T>::infinity());
            for (int64_t j = 0; j < padded; j += kWidth)
                for (int64_t k = 0; k < kWidth; ++k) greatest[k] = x[j + k] > greatest[k] ? x[j + k] : greatest[k];
        }
        const double top = double(*std::max_element(greatest, greatest + kWidth));
        for (int64_t j = 0; j < row; ++j) e[j] = exp_negative(e[j] - top);
        return sum(e, row);
    }

    // x has room for whole lanes after its n numbers.
    static SEME_INLINE double sum(double* x, int64_t n) {
        const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
        std::fill(x + n, x + padded, 0.0);
        Lanes lanes;
        lanes.add(x, padded);
        return lanes.fold();
    }

    static SEME_INLINE void round(double* x, int64_t n) {
        T rounded[kTile];
        for (int64_t begin = 0; begin < n; begin += kTile) {
            const int64_t end = std::min(kTile, n - begin);
            for (int64_t j = 0; j < end; ++j) rounded[j] = T(x[begin + j]);
            for (int64_t j = 0; j < end; ++j) rounded[j] = C::round(rounded[j]);
            for (int64_t j = 0; j < end; ++j) x[begin + j] = double(rounded[j]);
        }
    }

    // x[0..n) = x * factor + 1e-8, both results rounded.
    static SEME_INLINE void share(double* x, int64_t n, double factor) {
        for (int64_t j = 0; j < n; ++j) x[j] *= factor;
        round(x, n);
        for (int64_t j = 0; j < n; ++j) x[j] += kEpsilon;
        round(x, n);
    }

    static SEME_INLINE void run(const std::vector<View>* tensors, int64_t row, bool rounded, double* out, int64_t r0,
                                int64_t r1) {
        std::vector<double> room(2 * (row + kLanes));
        double *q = room.data(), *p = q + row + kLanes;
        for (int64_t r = r0; r < r1; ++r) {
            const double base = 1.0 / exponentials((*tensors)[0], r * row, row, q);
            const double other = 1.0 / exponentials((*tensors)[1], r * row, row, p);
            if (rounded) {
                share(p, row, other);
                share(q, row, base);
                // Loops of their own, which compilers vectorise.
                for (int64_t j = 0; j < row; ++j) q[j] = p[j] / q[j];
                round(q, row);
                for (int64_t j = 0; j < row; ++j) q[j] = log_positive(q[j]);
                round(q, row);
                for (int64_t j = 0; j < row; ++j) p[j] *= q[j];
                round(p, row);
                out[r] = sum(p, row);
                round(out + r, 1);
            } else {
                for (int64_t j = 0; j < row; ++j) {
                    const double a = p[j] * other + kEpsilon;
                    p[j] = a * log_ratio(a, q[j] * base + kEpsilon);
                }
                const double found = sum(p, row);
                out[r] = found < 0 ? 0.0 : found;
            }
        }
    }
};

}  // namespace

void row_divergence(const std::vector<View>& tensors, int64_t row, bool rounded, DType compute, double* out,
                    int threads) {
    const int64_t rows = row > 0 ? tensors[0].n / row : 0;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
    parallel_parts(parts, [&](int64_t p) {
        run_computed<Body>(compute, &tensors, row, rounded, out, rows * p / parts, rows * (p + 1) / parts);
    });
}

}  // namespace seme::cpu
