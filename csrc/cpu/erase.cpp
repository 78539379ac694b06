// The least squares of the op `resolve`. Built with fused multiply-adds: sums are held to an error bound, not to the
// bit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../parallel.h"
#include "nearest.h"

namespace seme::cpu {
namespace {

// The Cholesky factor of a Gram matrix, column by column; one whose pivot is too small depends on those before it and
// is left out.
struct Cholesky {
    int64_t k;
    std::vector<double> lower;  // [k, k]; 0 on the diagonal: left out

    void factor(const std::vector<double>& gram, double dependent) {
        for (int64_t j = 0; j < k; ++j) {
            const double own = gram[j * k + j], rest = own - dot(j, j, j);
            const double pivot = rest > dependent * own ? std::sqrt(rest) : 0.0;
            lower[j * k + j] = pivot;
            for (int64_t i = j + 1; i < k; ++i)
                lower[i * k + j] = pivot > 0 ? (gram[i * k + j] - dot(i, j, j)) / pivot : 0.0;
        }
    }

    void solve(double* b) const {
        for (int64_t j = 0; j < k; ++j) {
            const double pivot = lower[j * k + j];
            for (int64_t p = 0; p < j; ++p) b[j] -= lower[j * k + p] * b[p];
            b[j] = pivot > 0 ? b[j] / pivot : 0.0;
        }
        for (int64_t j = k - 1; j >= 0; --j) {
            const double pivot = lower[j * k + j];
            for (int64_t i = j + 1; i < k; ++i) b[j] -= lower[i * k + j] * b[i];
            b[j] = pivot > 0 ? b[j] / pivot : 0.0;
        }
    }

  private:
    double dot(int64_t i, int64_t j, int64_t n) const {
        double sum = 0;
        for (int64_t p = 0; p < n; ++p) sum += lower[i * k + p] * lower[j * k + p];
        return sum;
    }
};

template <class C>
struct Erase {
    using T = typename C::T;
    using W = Wide<T>;
    static constexpr int64_t kChunk = 1024;     // columns at a time; k rows of them fit the L2 cache
    static constexpr int64_t kRefinements = 3;  // at most; two passes are the rule

    static SEME_INLINE void run(const Matrix* vectors, const Matrix* bases, const Matrix* scores, int64_t* labels,
                                double dependent, const Matrix* residual, int64_t begin, int64_t end) {
        const int64_t k = scores->cols, padded = (k + 3) / 4 * 4;
        std::vector<T> tile(padded * kChunk);
        std::vector<double> gram(padded * padded), own(k * k), c(k), step(k);
        Cholesky cholesky{k, std::vector<double>(k * k)};
        const T* rows[kMost];
        for (int64_t i = begin; i < end; ++i) {
            T* score = scores->at<T>(i);
            int64_t* label = labels + i * k;
            sort(score, label, k);
            std::fill(gram.begin(), gram.end(), 0.0);
            for (int64_t at = 0; at < bases->cols; at += kChunk) {
                const int64_t n = std::min(kChunk, bases->cols - at);
                const int64_t whole = load_rows(bases, label, k, padded, at, n, tile.data(), rows);
                add_gram(rows, padded, whole, gram.data());
            }
            for (int64_t a = 0; a < k; ++a)
                for (int64_t b = 0; b <= a; ++b) own[a * k + b] = gram[a * padded + b];
            cholesky.factor(own, dependent);
            for (int64_t j = 0; j < k; ++j) c[j] = double(score[j]);
            cholesky.solve(c.data());
            for (int64_t pass = 0;; ++pass) {
                subtract_rows(vectors, bases, label, c, residual, i, step);
                cholesky.solve(step.data());
                double largest = 0, change = 0;
                for (int64_t j = 0; j < k; ++j) {
                    largest = std::max(largest, std::abs(c[j]));
                    change = std::max(change, std::abs(step[j]));
                }
                if (pass == kRefinements || !(change > double(std::numeric_limits<T>::epsilon()) * largest)) break;
                for (int64_t j = 0; j < k; ++j) c[j] += step[j];
            }
            for (int64_t j = 0; j < k; ++j) score[j] = T(c[j]);
        }
    }

    static void sort(T* score, int64_t* label, int64_t k) {
        Candidate<C> found[kMost];
        for (int64_t j = 0; j < k; ++j) found[j] = Candidate<C>::of(score[j], label[j]);
        std::sort(found, found + k);
        for (int64_t j = 0; j < k; ++j) {
            score[j] = found[j].score();
            label[j] = found[j].label();
        }
    }

    // rows[j] = columns [at, at + n) of a basis, where it is if that will do, else in the tile: as T, filled up with
    // zeros to whole vectors; rows from k on are zeros. The columns there are then.
    static SEME_INLINE int64_t load_rows(const Matrix* bases, const int64_t* label, int64_t k, int64_t padded,
                                         int64_t at, int64_t n, T* tile, const T** rows) {
        const bool in_place = bases->dtype == (sizeof(T) == 8 ? DType::F64 : DType::F32) && n % W::kLanes == 0;
        const int64_t whole = (n + W::kLanes - 1) / W::kLanes * W::kLanes;
        for (int64_t j = 0; j < padded; ++j) {
            T* own = tile + j * kChunk;
            rows[j] = own;
            if (j >= k)
                std::fill(own, own + whole, T(0));
            else if (in_place)
                rows[j] = bases->at<T>(label[j]) + at;
            else {
                load_tile<C>(bases->row(label[j]), at, n, own);
                std::fill(own + n, own + whole, T(0));
            }
        }
        return whole;
    }

    // Adds the dot products of rows to the lower half of gram[padded, padded], four by two of them in registers.
    static SEME_INLINE void add_gram(const T* const* rows, int64_t padded, int64_t n, double* gram) {
        for (int64_t i = 0; i < padded; i += 4)
            for (int64_t j = 0; j < i + 4; j += 2) {
                typename W::Vector sum[4][2] = {};
                for (int64_t x = 0; x < n; x += W::kLanes) {
                    const typename W::Vector b0 = W::load(rows[j] + x), b1 = W::load(rows[j + 1] + x);
                    for (int64_t r = 0; r < 4; ++r) {
                        const typename W::Vector a = W::load(rows[i + r] + x);
                        sum[r][0] += a * b0;
                        sum[r][1] += a * b1;
                    }
                }
                for (int64_t r = 0; r < 4; ++r)
                    for (int64_t s = 0; s < 2; ++s) gram[(i + r) * padded + j + s] += W::fold(sum[r][s]);
            }
    }

    // residual[i] = vectors[i] - sum_j c_j s_j, and products[j] = <s_j, residual[i]> before it is rounded.
    static SEME_INLINE void subtract_rows(const Matrix* vectors, const Matrix* bases, const int64_t* label,
                                          const std::vector<double>& c, const Matrix* residual, int64_t i,
                                          std::vector<double>& products) {
        constexpr int64_t kPart = 512;  // columns at a time
        double rest[kPart], row[kPart];
        std::fill(products.begin(), products.end(), 0.0);
        for (int64_t at = 0; at < bases->cols; at += kPart) {
            const int64_t n = std::min(kPart, bases->cols - at);
            load_tile<ComputeF64>(vectors->row(i), at, n, rest);
            for (size_t j = 0; j < c.size(); ++j) {
                if (c[j] == 0) continue;
                load_tile<ComputeF64>(bases->row(label[j]), at, n, row);
                for (int64_t x = 0; x < n; ++x) rest[x] -= c[j] * row[x];
            }
            for (size_t j = 0; j < c.size(); ++j) {
                load_tile<ComputeF64>(bases->row(label[j]), at, n, row);
                products[j] += dot(row, rest, n);
            }
            store_tile(rest, n, residual->row(i), at);
        }
    }

    static SEME_INLINE double dot(const double* a, const double* b, int64_t n) {
        constexpr int64_t kSums = 16;
        double sums[kSums] = {};
        int64_t x = 0;
        for (; x + kSums <= n; x += kSums)
            for (int64_t s = 0; s < kSums; ++s) sums[s] += a[x + s] * b[x + s];
        double sum = 0;
        for (; x < n; ++x) sum += a[x] * b[x];
        for (int64_t s = 0; s < kSums; ++s) sum += sums[s];
        return sum;
    }
};

}  // namespace

void erase(const Matrix& vectors, const Matrix& bases, const Matrix& scores, int64_t* labels, double dependent,
           const Matrix& residual, int threads) {
    parallel_blocks(vectors.rows, threads, [&](int64_t begin, int64_t end) {
        if (scores.dtype == DType::F64)
            run_best<Erase<ComputeF64>>(&vectors, &bases, &scores, labels, dependent, &residual, begin, end);
        else
            run_best<Erase<ComputeF32>>(&vectors, &bases, &scores, labels, dependent, &residual, begin, end);
    });
}

}  // namespace seme::cpu
