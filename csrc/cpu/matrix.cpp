#include <algorithm>

#include "../parallel.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

template <class C>
struct Subtract {
    using T = typename C::T;

    static SEME_INLINE void run(const Matrix* base, const Matrix* tensor, const Matrix* delta, int64_t begin,
                                int64_t end) {
        T b[kTile];
        for (int64_t i = begin; i < end; ++i)
            for (int64_t at = 0; at < delta->cols; at += kTile) {
                const int64_t n = std::min(kTile, delta->cols - at);
                load_tile<C>(base->row(i), at, n, b);
                load_delta<C>(tensor->row(i), at, n, b, delta->at<T>(i) + at);
            }
    }
};

template <class C>
struct AddScaled {
    using T = typename C::T;

    static SEME_INLINE void run(const Matrix* base, const Matrix* delta, double scale, const Matrix* out, int64_t begin,
                                int64_t end) {
        T b[kTile], d[kTile];
        for (int64_t i = begin; i < end; ++i)
            for (int64_t at = 0; at < out->cols; at += kTile) {
                const int64_t n = std::min(kTile, out->cols - at);
                load_tile<C>(base->row(i), at, n, b);
                load_tile<C>(delta->row(i), at, n, d);
                add_scaled<C>(b, d, n, scale);
                store_tile(b, n, out->row(i), at);
            }
    }
};

}  // namespace

void subtract(const Matrix& base, const Matrix& tensor, const Matrix& delta, int threads) {
    parallel_blocks(delta.rows, threads, [&](int64_t begin, int64_t end) {
        run_computed<Subtract>(delta.dtype, &base, &tensor, &delta, begin, end);
    });
}

void add_scaled(const Matrix& base, const Matrix& delta, double scale, const Matrix& out, int threads) {
    parallel_blocks(out.rows, threads, [&](int64_t begin, int64_t end) {
        run_computed<AddScaled>(delta.dtype, &base, &delta, scale, &out, begin, end);
    });
}

}  // namespace seme::cpu
