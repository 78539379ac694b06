// The selection of the op `resolve`: for each vector the k bases of greatest |dot product|.
//
// Few of the dot products matter. So all are screened in 16-bit fixed point, where one instruction multiplies twice as
// many numbers as in float32, and those that may be among the best are computed anew, in full. Nothing is missed: by
// Cauchy and Schwarz the screening is off by no more than the rounding errors of both vectors allow, and these are
// measured. It is some thousandths of the spread of the dot products, so little more than the best pass.
//
// A vector r is held as the integers q = round(c r), |q| <= 32767 (a Euclidean norm, with room for the rounding): then
// its entries fit 16 bits, and sums of products of two vectors, whole or in part, 32 bits.
//
// Built with fused multiply-adds: full dot products are held to an error bound, not to the bit.
#include "nearest.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace seme::cpu {
namespace {

constexpr int64_t kRows = 6, kCols = 16;  // vectors x labels whose sums are in registers at a time
constexpr int64_t kPairs = 256;           // pairs of columns at a time: of 16 labels they are half of the L1 cache
constexpr int64_t kBand = 96;             // vectors at a time: with kPairs of each they fit the L2 cache
constexpr int64_t kLabels = 512;          // labels at a time
constexpr int64_t kChunk = 256;           // columns that are converted at a time
constexpr double kScale = 32000;          // Euclidean norm in fixed point, before it is rounded
static_assert(kBand % kRows == 0 && kLabels % kCols == 0 && kChunk % 16 == 0, "whole panels");

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// sums[6, 16] (+)= products of 6 vectors and 16 labels over some pairs of columns. a: [pair][vector], a pair being two
// int16; b: [pair][label]; the rows of sums are `stride` apart.
using Multiply = void (*)(int64_t pairs, const int32_t* a, const int32_t* b, int32_t* sums, int64_t stride, bool first);

void multiply(int64_t pairs, const int32_t* a, const int32_t* b, int32_t* sums, int64_t stride, bool first) {
    for (int64_t r = 0; r < kRows; ++r)
        for (int64_t j = 0; j < kCols; ++j) {
            int32_t sum = first ? 0 : sums[r * stride + j];
            for (int64_t p = 0; p < pairs; ++p) {
                const uint32_t x = uint32_t(a[p * kRows + r]), y = uint32_t(b[p * kCols + j]);
                sum += int32_t(int16_t(x)) * int16_t(y) + int32_t(int16_t(x >> 16)) * int16_t(y >> 16);
            }
            sums[r * stride + j] = sum;
        }
}

#if defined(__x86_64__)
__attribute__((target("arch=x86-64-v3"))) void multiply_avx2(int64_t pairs, const int32_t* a, const int32_t* b,
                                                             int32_t* sums, int64_t stride, bool first) {
    static_assert(kRows == 6 && kCols == 16, "as written out below");
    // Twelve sums, two halves of the labels and a vector are all sixteen registers. GCC keeps them there only if they
    // have names and may not move the steps.
    __m256i low0 = _mm256_setzero_si256(), low1 = low0, low2 = low0, low3 = low0, low4 = low0, low5 = low0;
    __m256i high0 = low0, high1 = low0, high2 = low0, high3 = low0, high4 = low0, high5 = low0;
    for (int64_t p = 0; p < pairs; ++p, a += kRows, b += kCols) {
        const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(b));
        const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 8));
        __m256i x;
#define SEME_STEP(r)                                                                                                   \
    x = _mm256_set1_epi32(a[r]);                                                                                       \
    low##r = _mm256_add_epi32(low##r, _mm256_madd_epi16(x, low));                                                      \
    high##r = _mm256_add_epi32(high##r, _mm256_madd_epi16(x, high));                                                   \
    asm("" : "+x"(low##r), "+x"(high##r))
        SEME_STEP(0);
        SEME_STEP(1);
        SEME_STEP(2);
        SEME_STEP(3);
        SEME_STEP(4);
        SEME_STEP(5);
#undef SEME_STEP
    }
    const __m256i found[kRows][2] = {{low0, high0}, {low1, high1}, {low2, high2},
                                     {low3, high3}, {low4, high4}, {low5, high5}};
    for (int64_t r = 0; r < kRows; ++r)
        for (int64_t h = 0; h < 2; ++h) {
            __m256i* at = reinterpret_cast<__m256i*>(sums + r * stride + 8 * h);
            _mm256_storeu_si256(at, first ? found[r][h] : _mm256_add_epi32(found[r][h], _mm256_loadu_si256(at)));
        }
}
#endif

Multiply best_multiply() {
#if defined(__x86_64__)
    if (isa() != Isa::Baseline) return multiply_avx2;
#endif
    return multiply;
}

// Zeroed memory for pairs of columns, aligned to cache lines.
struct Pairs {
    explicit Pairs(int64_t n) : memory(n + 16) {}
    int32_t* data() {
        const auto address = reinterpret_cast<uintptr_t>(memory.data());
        return memory.data() + (64 - address % 64) % 64 / 4;
    }

  private:
    std::vector<int32_t> memory;
};

// True if a vector of this norm can be held: beyond, its scale overflows float. False for NaN.
bool usable(double norm) { return norm == 0 || (norm > 1e-30 && norm < 1e30); }

template <class C>
struct Fixed {
    using T = typename C::T;
    using W = Wide<T>;

    static SEME_INLINE double norm_of(const View& row) {
        const double sum = squares<T>(row);
        // Squares of float underflow and overflow early.
        return std::sqrt(sum > 1e-30 && sum < 1e30 ? sum : squares<double>(row));
    }

    template <class S>
    static SEME_INLINE double squares(const View& row) {
        T memory[kChunk];
        double sum = 0;
        for (int64_t at = 0; at < row.n; at += kChunk) {
            int64_t n;
            const T* x = chunk(row, at, memory, n);
            S lanes[16] = {};
            for (int64_t j = 0; j < n; j += 16)
                for (int64_t l = 0; l < 16; ++l) lanes[l] += S(x[j + l]) * S(x[j + l]);
            for (S lane : lanes) sum += double(lane);
        }
        return sum;
    }

    // Rows [first, first + n) of a matrix, of the given norms, into a panel of `Rows` rows, [pair][row]; zeros for rows
    // that are not there or not usable. errors: what |r - q / c| is at most.
    template <int64_t Rows>
    static SEME_INLINE void pack(const Matrix& matrix, int64_t first, int64_t n, const double* norms, int32_t* panel,
                                 double* errors) {
        int16_t q[Rows][kChunk] = {};
        double sums[Rows] = {};
        for (int64_t at = 0; at < matrix.cols; at += kChunk) {
            int64_t whole = 0;
            for (int64_t r = 0; r < n; ++r) whole = round_chunk(matrix.row(first + r), at, norms[r], q[r], sums[r]);
            for (int64_t p = 0; p < whole / 2; ++p)
                for (int64_t r = 0; r < Rows; ++r) memcpy(panel + (at / 2 + p) * Rows + r, q[r] + 2 * p, 4);
        }
        // What was rounded away was summed up in float.
        for (int64_t r = 0; r < n; ++r) errors[r] = norms[r] * (1.001 * std::sqrt(sums[r]) / kScale + 1e-6);
    }

    // q = the columns from `at` on in fixed point; adds the squares of what is rounded away to the sum. How many.
    static SEME_INLINE int64_t round_chunk(const View& row, int64_t at, double norm, int16_t* q, double& sum) {
        constexpr float kMagic = 12582912.0f;  // 3 * 2^22: adding it leaves the nearest integer in the low bits
        const bool held = usable(norm) && norm > 0;
        const float c = held ? float(kScale / norm) : 0.0f;
        T memory[kChunk];
        int64_t n;
        const T* x = chunk(row, at, memory, n);
        if (!held) return n;
        float rest[kChunk];
        for (int64_t j = 0; j < n; ++j) {
            const float shifted = float(x[j]) * c + kMagic;
            q[j] = int16_t(bit_cast<int32_t>(shifted) - 0x4B400000);
            rest[j] = float(x[j]) * c - (shifted - kMagic);
        }
        typename Wide<float>::Vector total = {};
        for (int64_t j = 0; j < n; j += 8) total += Wide<float>::load(rest + j) * Wide<float>::load(rest + j);
        sum += Wide<float>::fold(total);
        return n;
    }

    // Columns from `at` on as T, n of them: up to kChunk, filled up with zeros to a multiple of 16. Where they are, if
    // that will do, else in `memory`.
    static SEME_INLINE const T* chunk(const View& row, int64_t at, T* memory, int64_t& n) {
        const int64_t there = std::min(kChunk, row.n - at);
        n = (there + 15) / 16 * 16;
        if (row.dtype == (sizeof(T) == 8 ? DType::F64 : DType::F32) && n == there)
            return static_cast<const T*>(row.data) + at;
        load_tile<C>(row, at, there, memory);
        for (int64_t j = there; j < n; ++j) memory[j] = T(0);
        return memory;
    }
};

// The vectors in fixed point.
struct Queries {
    Queries(int64_t rows, int64_t cols)
        : pairs(up(std::max<int64_t>(cols, 1), 16) / 2), packed(up(rows, kRows) * pairs), norm(rows), error(rows) {}
    int64_t pairs;
    Pairs packed;  // [row / 6][pair][row % 6]
    std::vector<double> norm, error;
};

template <class C>
struct PackQueries {
    // Rows of the panels [begin, end).
    static SEME_INLINE void run(const Matrix* vectors, Queries* queries, int64_t begin, int64_t end) {
        for (int64_t first = begin * kRows; first < std::min(end * kRows, vectors->rows); first += kRows) {
            const int64_t n = std::min(kRows, vectors->rows - first);
            for (int64_t r = first; r < first + n; ++r) queries->norm[r] = Fixed<C>::norm_of(vectors->row(r));
            Fixed<C>::template pack<kRows>(*vectors, first, n, queries->norm.data() + first,
                                           queries->packed.data() + first * queries->pairs,
                                           queries->error.data() + first);
        }
    }
};

template <class C>
struct Nearest {
    using T = typename C::T;
    using Key = typename C::Key;
    using W = Wide<T>;
    static constexpr int64_t kStep = 32, kLanes = 8;  // columns that one test covers
    static constexpr int64_t kRoom = 256;             // candidates before the worst are dropped

    // Labels in fixed point.
    struct Tile {
        int64_t first, n;
        double norm, least_norm, error;  // the greatest norm and error of a label, and the least norm
        bool usable;
    };

    // The nearest of the labels [begin, end) to all vectors, to scores[rows, k] and labels[rows, k]; what is -1 there
    // stays so if there are fewer than k.
    static SEME_INLINE void run(const Matrix* vectors, const Matrix* bases, Queries* queries, Multiply multiply,
                                T* scores, int64_t* labels, int64_t k, int64_t begin, int64_t end) {
        const int64_t pairs = queries->pairs;
        Pairs packed(kLabels * pairs), sums(kBand * kLabels);
        for (int64_t first = begin; first < end; first += kLabels) {
            const Tile tile = pack_labels(*bases, first, std::min(kLabels, end - first), pairs, packed.data());
            for (int64_t i = 0; i < vectors->rows; i += kBand) {
                const int64_t rows = std::min(kBand, vectors->rows - i);
                multiply_band(queries->packed.data() + i * pairs, up(rows, kRows), packed.data(), up(tile.n, kCols),
                              pairs, sums.data(), multiply);
                for (int64_t r = i; r < i + rows; ++r)
                    update(*vectors, r, *bases, tile, *queries, sums.data() + (r - i) * kLabels, scores + r * k,
                           labels + r * k, k);
            }
        }
    }

    static SEME_INLINE Tile pack_labels(const Matrix& bases, int64_t first, int64_t n, int64_t pairs, int32_t* packed) {
        Tile tile{first, n, 0, std::numeric_limits<double>::infinity(), 0, true};
        double norms[kCols], errors[kCols];
        for (int64_t j = 0; j < n; j += kCols) {
            const int64_t rows = std::min(kCols, n - j);
            for (int64_t r = 0; r < rows; ++r) {
                norms[r] = Fixed<C>::norm_of(bases.row(first + j + r));
                tile.usable &= usable(norms[r]);
                tile.norm = std::max(tile.norm, norms[r]);
                tile.least_norm = std::min(tile.least_norm, norms[r]);
            }
            Fixed<C>::template pack<kCols>(bases, first + j, rows, norms, packed + j * pairs, errors);
            tile.error = std::max(tile.error, *std::max_element(errors, errors + rows));
        }
        return tile;
    }

    static SEME_INLINE void multiply_band(const int32_t* a, int64_t rows, const int32_t* b, int64_t labels,
                                          int64_t pairs, int32_t* sums, Multiply multiply) {
        for (int64_t at = 0; at < pairs; at += kPairs)
            for (int64_t j = 0; j < labels; j += kCols)
                for (int64_t i = 0; i < rows; i += kRows)
                    multiply(std::min(kPairs, pairs - at), a + i * pairs + at * kRows, b + j * pairs + at * kCols,
                             sums + i * kLabels + j, kLabels, at == 0);
    }

    // Merges a tile into the best labels of one vector so far.
    static SEME_INLINE void update(const Matrix& vectors, int64_t row, const Matrix& bases, const Tile& tile,
                                   const Queries& queries, const int32_t* sums, T* scores, int64_t* labels, int64_t k) {
        Candidate<C> found[kRoom];
        int64_t n = 0;
        for (; n < k && labels[n] >= 0; ++n) found[n] = Candidate<C>::of(scores[n], labels[n]);
        Key worst_key = n == k ? worst(found, n) : -1;
        const bool screened = tile.usable && usable(queries.norm[row]);
        const int32_t least = screened ? least_sum(vectors, row, tile, queries, sums, n, k, worst_key) : -1;
        const T* r = vectors.at<T>(row);
        for (int64_t at = 0; at < tile.n; at += kStep) {
            if (screened && at + kStep <= tile.n && !any_above(sums + at, least)) continue;
            for (int64_t j = at; j < std::min(at + kStep, tile.n); ++j) {
                if (screened && std::abs(sums[j]) <= least) continue;
                const int64_t label = tile.first + j;
                const auto candidate = Candidate<C>::of(dot(r, bases.row(label)), label);
                if (candidate.key() <= worst_key) continue;  // of equal ones the earlier label stays
                found[n++] = candidate;
                if (n < kRoom) continue;
                n = drop(found, n, k);
                worst_key = worst(found, n);
            }
        }
        if (n > k) n = drop(found, n, k);
        for (int64_t j = 0; j < n; ++j) {
            scores[j] = found[j].score();
            labels[j] = found[j].label();
        }
    }

    // A label whose |sum| is not greater than this is none of the k best.
    static SEME_INLINE int32_t least_sum(const Matrix& vectors, int64_t row, const Tile& tile, const Queries& queries,
                                         const int32_t* sums, int64_t n, int64_t k, Key worst_key) {
        const double norm = queries.norm[row], error = queries.error[row];
        if (norm == 0 || tile.norm == 0) return n == k ? 0 : -1;    // all products are 0
        const double scale = kScale / norm * (kScale / tile.norm);  // of the label of greatest norm; no other has less
        const double screening = error * tile.norm + (norm + error) * tile.error;
        // Of a full dot product, in sums of an eighth of the terms at most.
        const double rounding =
            double(vectors.cols + 64) / 8 * std::numeric_limits<float>::epsilon() * norm * tile.norm;
        const double doubt = scale * (screening + rounding);
        if (n == k) return floor_of(scale * std::abs(double(bit_cast<T>(worst_key))) - doubt);
        // Both the bound and the label are in doubt; a label that is as good as the bound has to pass.
        return floor_of(double(first_bound(sums, tile.n, k)) * (tile.least_norm / tile.norm) - 2 * doubt) - 1;
    }

    static SEME_INLINE int32_t floor_of(double x) { return x >= 0 ? int32_t(std::min(x, 2147483647.0)) : -1; }

    static SEME_INLINE bool any_above(const int32_t* sums, int32_t least) {
        int32_t any = 0;
        for (int64_t j = 0; j < kStep; ++j) any |= int32_t(std::abs(sums[j]) > least);
        return any != 0;
    }

    // What the k-th greatest |sum| is at least: the greatest ones of k groups of columns are k of them, so the least of
    // these. -1 if there are too few columns.
    static SEME_INLINE int32_t first_bound(const int32_t* sums, int64_t cols, int64_t k) {
        const int64_t group = cols / k / kLanes * kLanes;
        if (group == 0) return -1;
        int32_t bound = std::numeric_limits<int32_t>::max();
        for (int64_t g = 0; g < k; ++g) {
            int32_t greatest = 0;
            for (int64_t j = 0; j < group; ++j) greatest = std::max(greatest, std::abs(sums[g * group + j]));
            bound = std::min(bound, greatest);
        }
        return bound;
    }

    // <r, s>, the same for the same operands wherever they are.
    static SEME_INLINE T dot(const T* r, const View& s) {
        typename W::Vector sum[4] = {};
        T copy[kChunk];
        double rest = 0;
        for (int64_t at = 0; at < s.n; at += kChunk) {
            const int64_t n = std::min(kChunk, s.n - at);
            const T* x = copy;
            if (s.dtype == (sizeof(T) == 8 ? DType::F64 : DType::F32))
                x = static_cast<const T*>(s.data) + at;
            else
                load_tile<C>(s, at, n, copy);
            int64_t j = 0;
            for (; j + 4 * W::kLanes <= n; j += 4 * W::kLanes)
                for (int64_t l = 0; l < 4; ++l)
                    sum[l] += W::load(r + at + j + l * W::kLanes) * W::load(x + j + l * W::kLanes);
            for (; j < n; ++j) rest += double(r[at + j]) * double(x[j]);
        }
        return T(W::fold((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest);
    }

    static SEME_INLINE Key worst(const Candidate<C>* found, int64_t n) {
        Key key = found[0].key();
        for (int64_t j = 1; j < n; ++j) key = std::min(key, found[j].key());
        return key;
    }

    // Drops all but the k best of n; how many there are then.
    static int64_t drop(Candidate<C>* found, int64_t n, int64_t k) {
        std::nth_element(found, found + k - 1, found + n);
        return k;
    }
};

template <class C>
void find_nearest(const Matrix& vectors, const Matrix& bases, const Matrix& scores, int64_t* labels, int threads) {
    using T = typename C::T;
    const int64_t k = scores.cols, size = vectors.rows * k;
    Queries queries(vectors.rows, vectors.cols);
    parallel_blocks(vectors.rows, threads,
                    [&](int64_t begin, int64_t end) { run_best<PackQueries<C>>(&vectors, &queries, begin, end); });
    // Each thread has labels of its own; the k best of all are among the k best of each.
    const int64_t parts = std::clamp<int64_t>(bases.rows / kLabels, 1, threads);
    std::vector<T> part_scores(parts * size);
    std::vector<int64_t> part_labels(parts * size, -1);
    parallel_parts(parts, [&](int64_t p) {
        run_best<Nearest<C>>(&vectors, &bases, &queries, best_multiply(), part_scores.data() + p * size,
                             part_labels.data() + p * size, k, bases.rows * p / parts, bases.rows * (p + 1) / parts);
    });
    std::vector<Candidate<C>> found;
    for (int64_t i = 0; i < vectors.rows; ++i) {
        found.clear();
        for (int64_t p = 0; p < parts; ++p)
            for (int64_t j = p * size + i * k; j < p * size + (i + 1) * k; ++j)
                if (part_labels[j] >= 0) found.push_back(Candidate<C>::of(part_scores[j], part_labels[j]));
        std::nth_element(found.begin(), found.begin() + k - 1, found.end());
        for (int64_t j = 0; j < k; ++j) {
            scores.at<T>(i)[j] = found[j].score();
            labels[i * k + j] = found[j].label();
        }
    }
}

}  // namespace

void nearest(const Matrix& vectors, const Matrix& bases, const Matrix& scores, int64_t* labels, int threads) {
    if (vectors.dtype == DType::F64)
        find_nearest<ComputeF64>(vectors, bases, scores, labels, threads);
    else
        find_nearest<ComputeF32>(vectors, bases, scores, labels, threads);
}

}  // namespace seme::cpu
