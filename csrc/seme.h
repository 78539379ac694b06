// The torch-free interface of the kernels: raw pointers, element counts and dtype codes.
// One prototype per op; the Python twin of each (seme/ops/<op>.py) holds its documentation.
#pragma once

#include <cstdint>
#include <vector>

namespace seme {

enum class DType : int { F32 = 0, F16 = 1, BF16 = 2, F64 = 3 };

inline int64_t itemsize(DType t) { return t == DType::F64 ? 8 : t == DType::F32 ? 4 : 2; }

// Contiguous memory of n elements. Whoever makes a View vouches for the pointer and the count.
struct View {
    void* data;
    int64_t n;
    DType dtype;
};

// What a file did not give: how many runs it gave before, and why it ended (errno; 0: it is shorter).
struct ReadError {
    int64_t run;
    int number;
};

// Reads `n` runs of bytes of an open file: sizes[i] from offsets[i] on, to `to` + places[i]. Throws ReadError.
void read_runs(int file, int64_t n, const int64_t* offsets, const int64_t* places, const int64_t* sizes, char* to);

// Rows of contiguous elements, `stride` elements apart. Whoever makes a Matrix vouches for all of it.
struct Matrix {
    void* data;
    int64_t rows, cols, stride;
    DType dtype;

    View row(int64_t i) const { return {static_cast<char*>(data) + i * stride * itemsize(dtype), cols, dtype}; }
    template <class T>
    T* at(int64_t i) const {
        return static_cast<T*>(data) + i * stride;
    }
};

// Reductions give one partial result per block of this many elements, so that their value depends on
// neither the chunk size nor the number of threads. Chunks begin at a multiple of it.
constexpr int64_t kBlock = 8192;

inline int64_t blocks(int64_t n) { return (n + kBlock - 1) / kBlock; }

// What the ops on task vectors keep of each of the n task vectors. Empty vectors keep all.
struct Selection {
    // [n] or [2 n]. Keys above the first n thresholds stay, and the first `quotas` elements whose key equals them. What
    // would stay by the second n is dropped.
    std::vector<int64_t> thresholds, quotas;
    // [n]. Of what stays, an element is kept with a chance of chances[i] / 2^32, by a number that depends on the key
    // seeds[i] and the element's index: `offset` + its place in the call. See philox.h.
    std::vector<int64_t> chances, seeds;
    int64_t offset = 0;
    // [n], without thresholds: the chance grows by floor(spreads[i] * rank / (row - 1)), with the rank of the magnitude
    // within the element's row of `row` elements, from 0, of equal ones by index.
    std::vector<int64_t> spreads;
    int64_t row = 0;
};

struct Weights;  // weights.h

namespace cpu {

void weighted_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, DType compute,
                  View out, int threads);

// out[blocks, n, n]
void inner_products(const std::vector<View>& tensors, DType compute, double* out, int threads);

// Adds to out[n]; with `zero`, writes 0 over what it counts.
void nonfinite(const std::vector<View>& tensors, bool zero, int64_t* out, int threads);

// out[blocks of `block` elements, n, n], or with columns > 0 out[blocks, n, n, columns]; `relative`: of the differences
// of the others from the first.
void line_products(const std::vector<View>& tensors, bool relative, int64_t block, int64_t columns, DType compute,
                   double* out, int threads);

// `relative`: tensors[0] is the base.
void line_sum(const std::vector<View>& tensors, bool relative, const Weights& weights, DType compute, View out,
              int threads);

// tensors[0] is the base.
void nearswap(const std::vector<View>& tensors, double t, double least, DType compute, View out, int threads);

// Ops on task vectors: tensors[0] is the base, the n others have one entry each in the other vectors.
void task_vector_sum(const std::vector<View>& tensors, const std::vector<double>& weights,
                     const std::vector<double>& factors, const Selection& selection, double divisor, double scale,
                     DType compute, View out, int threads);

// Adds to out[n, kBins + 2].
void magnitude_histogram(const std::vector<View>& tensors, const std::vector<int64_t>& lowest,
                         const std::vector<int64_t>& shift, DType compute, int64_t* out, int threads);

// Adds to out[thresholds].
void tie_counts(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, DType compute, int64_t* out,
                int threads);

void ties(const std::vector<View>& tensors, const std::vector<double>& weights, const std::vector<double>& factors,
          const Selection& selection, bool normalize, double scale, DType compute, View out, int threads);

// out[blocks, n, 2]; with selection.row out[rows, n, 2]
void trimmed_l1(const std::vector<View>& tensors, const Selection& selection, DType compute, double* out, int threads);

// Selection by the variance over the task vectors: one threshold and quota for all of them.

// Adds to out[kBins + 2].
void variance_histogram(const std::vector<View>& tensors, int64_t lowest, int64_t shift, DType compute, int64_t* out,
                        int threads);

// Adds to out[1].
void variance_ties(const std::vector<View>& tensors, int64_t threshold, DType compute, int64_t* out, int threads);

// out[blocks, n]
void selected_squares(const std::vector<View>& tensors, int64_t threshold, int64_t tie_quota, DType compute,
                      double* out, int threads);

void sce(const std::vector<View>& tensors, const std::vector<double>& coefficients, int64_t threshold,
         int64_t tie_quota, DType compute, View out, int threads);

// scales: one per task vector; with `rounded`, the merged task vector and the result are rounded to the compute dtype.
void ram(const std::vector<View>& tensors, const std::vector<double>& scales, double epsilon, bool rounded,
         DType compute, View out, int threads);

// Adds to out[n, 2].
void overlap_counts(const std::vector<View>& tensors, double epsilon, DType compute, int64_t* out, int threads);

// Of a base and one other tensor, in rows of `row` elements.

// out[rows]
void row_divergence(const std::vector<View>& tensors, int64_t row, bool rounded, DType compute, double* out,
                    int threads);

// factors[rows]. Adds to out[windows, kBins + 2].
void importance_histogram(const std::vector<View>& tensors, const double* factors, int64_t row,
                          const std::vector<int64_t>& lowest, const std::vector<int64_t>& shift, DType compute,
                          int64_t* out, int threads);

void importance_fusion(const std::vector<View>& tensors, const double* factors, int64_t row, double threshold,
                       DType compute, View out, int threads);

// What surrounds the matrix products of the matrix ops (seme/ops/_matrix.py). Sums and products are float32, or float64
// where an operand of the op is; matrices called z, dots, delta and residual are of that type.

// delta = tensor - base
void subtract(const Matrix& base, const Matrix& tensor, const Matrix& delta, int threads);

// out = base + scale * delta, rounded once
void add_scaled(const Matrix& base, const Matrix& delta, double scale, const Matrix& out, int threads);

// z is [experts * rows, labels], the rows of one expert after those of another. Adds to tables[threads, kBins + 2,
// 1 + experts]: how many positions have their key in the bin, and each expert's sum of z^2 there; then those beyond
// the window; then how many keys are not the first of their bin.
void elect_select(const Matrix& z, int64_t experts, int64_t lowest, int shift, double* tables, int threads);

// The first expert's rows of z become the elected coordinates.
void elect(const Matrix& z, int64_t threshold, const std::vector<double>& etas, int threads);

// The rows of `bases` (labels) of the greatest |dot product| with each vector, of equal ones the lowest: scores[rows,
// k] and labels[rows, k], in no order.
void nearest(const Matrix& vectors, const Matrix& bases, const Matrix& scores, int64_t* labels, int threads);

// Sorts labels[rows, k] by falling magnitude of the scores, which become the least squares coefficients on these rows
// of `bases`, and gives what is left of the vectors.
void erase(const Matrix& vectors, const Matrix& bases, const Matrix& scores, int64_t* labels, double dependent,
           const Matrix& residual, int threads);

}  // namespace cpu
}  // namespace seme
