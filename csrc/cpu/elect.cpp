// What happens to the semantic coordinates z of the experts between the two matrix products of the rule `elect`.
#include <algorithm>

#include "../parallel.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

constexpr int64_t kPart = 256;  // positions at a time: what they need stays in the L1 cache

// Rows of the experts at one place: z[m * stride], for m in [0, n).
template <class T>
struct Experts {
    const T* z;
    int64_t n, stride;
    const T* operator[](int64_t m) const { return z + m * stride; }
};

// keys[0..count) of the variance over the experts, operation by operation as the reference has it.
template <class T>
SEME_INLINE void variance_keys(const Experts<T> z, int64_t count, int32_t* keys) {
    T mean[kPart], sum[kPart];
    for (int64_t j = 0; j < count; ++j) mean[j] = z[0][j];
    for (int64_t m = 1; m < z.n; ++m)
        for (int64_t j = 0; j < count; ++j) mean[j] += z[m][j];
    for (int64_t j = 0; j < count; ++j) mean[j] /= T(z.n);
    for (int64_t j = 0; j < count; ++j) sum[j] = (z[0][j] - mean[j]) * (z[0][j] - mean[j]);
    for (int64_t m = 1; m < z.n; ++m)
        for (int64_t j = 0; j < count; ++j) sum[j] += (z[m][j] - mean[j]) * (z[m][j] - mean[j]);
    for (int64_t j = 0; j < count; ++j) keys[j] = ComputeF32::key(float(sum[j] / T(z.n)));
}

template <class C>
struct Select {
    using T = typename C::T;

    static SEME_INLINE void run(const Matrix* z, int64_t experts, const Window<ComputeF32>* window, double* table,
                                int64_t begin, int64_t end) {
        const int64_t rows = z->rows / experts;
        for (int64_t i = begin; i < end; ++i)
            for (int64_t at = 0; at < z->cols; at += kPart)
                count({z->at<T>(i) + at, experts, rows * z->stride}, std::min(kPart, z->cols - at), *window, table);
    }

    static SEME_INLINE void count(const Experts<T> z, int64_t n, const Window<ComputeF32> w, double* table) {
        const int64_t columns = 1 + z.n;
        int32_t keys[kPart], bins[kPart];
        variance_keys(z, n, keys);
        int32_t held = 0, passed = 0, mixed = 0;
        for (int64_t j = 0; j < n; ++j) {
            const bool in = w.holds(keys[j]);
            bins[j] = in ? w.bin(keys[j]) : -1;
            held += in;
            passed += w.passed(keys[j]);
            mixed += in & (w.rest(keys[j]) != 0);
        }
        table[(kBins + 1) * columns] += mixed;
        if (passed > 0) {
            double* beyond = table + kBins * columns;
            beyond[0] += passed;
            for (int64_t m = 0; m < z.n; ++m) beyond[1 + m] += squares_beyond(z[m], keys, n, w);
        }
        for (int64_t j = 0; held > 0 && j < n; ++j) {
            if (bins[j] < 0) continue;
            double* record = table + bins[j] * columns;
            record[0] += 1;
            for (int64_t m = 0; m < z.n; ++m) record[1 + m] += double(z[m][j]) * double(z[m][j]);
        }
    }

    static SEME_INLINE double squares_beyond(const T* z, const int32_t* keys, int64_t n, const Window<ComputeF32> w) {
        constexpr int64_t kSums = 8;
        double sums[kSums] = {};
        double part[kPart];
        for (int64_t j = 0; j < n; ++j) part[j] = double(keep_if(w.passed(keys[j]), z[j]));
        for (int64_t j = n; j % kSums != 0; ++j) part[j] = 0;
        for (int64_t j = 0; j < n; j += kSums)
            for (int64_t k = 0; k < kSums; ++k) sums[k] += part[j + k] * part[j + k];
        double sum = 0;
        for (int64_t k = 0; k < kSums; ++k) sum += sums[k];
        return sum;
    }
};
static_assert(kPart % 8 == 0, "a part is filled up to whole sums");

template <class C>
struct Elect {
    using T = typename C::T;

    static SEME_INLINE void run(const Matrix* z, int32_t threshold, const double* etas, int64_t experts, int64_t begin,
                                int64_t end) {
        const int64_t rows = z->rows / experts;
        for (int64_t i = begin; i < end; ++i)
            for (int64_t at = 0; at < z->cols; at += kPart) {
                T* out = z->at<T>(i) + at;
                combine({out, experts, rows * z->stride}, std::min(kPart, z->cols - at), threshold, etas, out);
            }
    }

    static SEME_INLINE void combine(const Experts<T> z, int64_t n, int32_t threshold, const double* etas, T* out) {
        int32_t keys[kPart];
        T sign[kPart], numerator[kPart], denominator[kPart];
        variance_keys(z, n, keys);
        for (int64_t j = 0; j < n; ++j) sign[j] = numerator[j] = denominator[j] = 0;
        for (int64_t m = 0; m < z.n; ++m)
            for (int64_t j = 0; j < n; ++j) sign[j] += z[m][j];
        for (int64_t j = 0; j < n; ++j) sign[j] = Ties<C>::elect(sign[j]);
        for (int64_t m = 0; m < z.n; ++m) {
            const T eta = T(etas[m]);
            for (int64_t j = 0; j < n; ++j) {
                const T weight = eta * Ties<C>::agrees(z[m][j], sign[j]);
                numerator[j] += weight * z[m][j];
                denominator[j] += weight;
            }
        }
        for (int64_t j = 0; j < n; ++j) {
            const T mean = numerator[j] / (denominator[j] + keep_if(denominator[j] == T(0), T(1)));
            out[j] = keep_if(keys[j] >= threshold, mean);
        }
    }
};

}  // namespace

void elect_select(const Matrix& z, int64_t experts, int64_t lowest, int shift, double* tables, int threads) {
    const int64_t rows = z.rows / experts, parts = std::clamp<int64_t>(rows, 1, threads);
    const auto window = Window<ComputeF32>::make(lowest, shift);
    parallel_parts(parts, [&](int64_t p) {
        double* table = tables + p * (kBins + 2) * (1 + experts);
        const int64_t begin = rows * p / parts, end = rows * (p + 1) / parts;
        if (z.dtype == DType::F64)
            run_best<Select<ComputeF64>>(&z, experts, &window, table, begin, end);
        else
            run_best<Select<ComputeF32>>(&z, experts, &window, table, begin, end);
    });
}

void elect(const Matrix& z, int64_t threshold, const std::vector<double>& etas, int threads) {
    const int64_t experts = int64_t(etas.size());
    const int32_t key = as_key<ComputeF32>(threshold);
    parallel_blocks(z.rows / experts, threads, [&](int64_t begin, int64_t end) {
        if (z.dtype == DType::F64)
            run_best<Elect<ComputeF64>>(&z, key, etas.data(), experts, begin, end);
        else
            run_best<Elect<ComputeF32>>(&z, key, etas.data(), experts, begin, end);
    });
}

}  // namespace seme::cpu
