// The CUDA twins of the prototypes in ../seme.h: device addresses instead of host addresses, a stream instead of
// threads. They launch and return; an error is a std::runtime_error that names what CUDA said.
#pragma once

#include "../seme.h"
#include "../weights.h"

namespace seme::cuda {

// A stream of PyTorch (or 0, the default stream) and the device it belongs to.
struct Stream {
    int device;
    uintptr_t handle;
};

constexpr int kMaxTensors = 32;  // per call; their addresses and numbers travel as kernel arguments

// Elements per thread block of an element-wise kernel.
constexpr int64_t kTile = 2048;

void weighted_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, DType compute,
                  View out, Stream stream);

// Ops on task vectors: tensors[0] is the base.
// A selection, and where its quotas end. tie_ends: the running sums of block_ties() along the blocks (of kBlock
// elements for trimmed_l1, else of kTile); null if no quota binds.
struct Kept : Selection {
    const int64_t* tie_ends;
};

void task_vector_sum(const std::vector<View>& tensors, const std::vector<double>& weights,
                     const std::vector<double>& factors, const Kept& kept, double divisor, double scale, DType compute,
                     View out, Stream stream);

// out: [blocks of kBlock, n, n].
void inner_products(const std::vector<View>& tensors, DType compute, double* out, Stream stream);

// out: [blocks of `block` elements, n, n], or with columns > 0 [blocks, n, n, columns]; `relative`: of the differences
// of the others from the first.
void line_products(const std::vector<View>& tensors, bool relative, int64_t block, int64_t columns, DType compute,
                   double* out, Stream stream);

// `relative`: tensors[0] is the base. sets.values (on the device) are the weights of rows or columns; null: `weights`
// are those of the tensors.
void line_sum(const std::vector<View>& tensors, bool relative, const std::vector<double>& weights, const Weights& sets,
              DType compute, View out, Stream stream);

// tensors[0] is the base.
void nearswap(const std::vector<View>& tensors, double t, double least, DType compute, View out, Stream stream);

// Adds to counts: [n, 65538].
void magnitude_histogram(const std::vector<View>& tensors, const std::vector<int64_t>& lowest,
                         const std::vector<int>& shift, DType compute, int64_t* counts, Stream stream);

// counts: [thresholds, blocks of `block` elements]: the keys of each block that equal the threshold.
void block_ties(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, DType compute, int64_t block,
                int64_t* counts, Stream stream);

void ties(const std::vector<View>& tensors, const std::vector<double>& weights, const std::vector<double>& factors,
          const Kept& kept, bool normalize, double scale, DType compute, View out, Stream stream);

// out: [blocks of kBlock, n, 2].
void trimmed_l1(const std::vector<View>& tensors, const Kept& kept, DType compute, double* out, Stream stream);

// Selection by the variance over the task vectors: one threshold and quota in `kept`, and tie_ends of one row.

// Adds to counts: [65538].
void variance_histogram(const std::vector<View>& tensors, int64_t lowest, int shift, DType compute, int64_t* counts,
                        Stream stream);

// counts: [blocks of `block` elements]: the variances of each block whose key equals the threshold.
void variance_ties(const std::vector<View>& tensors, int64_t threshold, DType compute, int64_t block, int64_t* counts,
                   Stream stream);

// out: [blocks of kBlock, n].
void selected_squares(const std::vector<View>& tensors, const Kept& kept, DType compute, double* out, Stream stream);

void sce(const std::vector<View>& tensors, const std::vector<double>& coefficients, const Kept& kept, DType compute,
         View out, Stream stream);

void ram(const std::vector<View>& tensors, const std::vector<double>& scales, double epsilon, bool rounded,
         DType compute, View out, Stream stream);

// Adds to counts: [n, 2].
void overlap_counts(const std::vector<View>& tensors, double epsilon, DType compute, int64_t* counts, Stream stream);

// Of a base and one other tensor, in rows of `row` elements.

// out: [rows].
void row_divergence(const std::vector<View>& tensors, int64_t row, bool rounded, DType compute, double* out,
                    Stream stream);

// factors: [rows]. Adds to counts: [windows, 65538].
void importance_histogram(const std::vector<View>& tensors, const double* factors, int64_t row,
                          const std::vector<int64_t>& lowest, const std::vector<int>& shift, DType compute,
                          int64_t* counts, Stream stream);

void importance_fusion(const std::vector<View>& tensors, const double* factors, int64_t row, double threshold,
                       DType compute, View out, Stream stream);

// Matrix ops. Row-major matrices: models and vectors [rows, columns], bases and dual frame [labels, columns].
struct Shape {
    int64_t rows, columns, labels;
};

constexpr int kMaxExperts = 8;  // whose sums a thread holds at once

// norms: [n, rows], the squared norms of the rows of tensors[1 + i] - tensors[0].
void squared_norms(const std::vector<View>& tensors, Shape shape, double* norms, Stream stream);

// Adds to counts: [65538], and energies: [n, 65537], in units of 1 / per_unit[i].
void elect_select(const std::vector<View>& tensors, const View& bases, Shape shape, int64_t lowest, int shift,
                  const double* per_unit, int64_t* counts, int64_t* energies, Stream stream);

// combined: [rows, pitch], of which `labels` columns are written; its dtype says what the products are done in:
// BF16 if all tensors are BF16, F64 if an operand is.
void elect_combine(const std::vector<View>& tensors, const View& bases, Shape shape, int64_t threshold,
                   const std::vector<double>& etas, const View& combined, int64_t pitch, Stream stream);

// out = base + scale * combined dual
void elect_recompose(const View& base, const View& combined, int64_t pitch, const View& dual, Shape shape, double scale,
                     View out, Stream stream);

// best: [rows, ranges, k] candidates, each the key of |score| above the complement of the label, in 32 bits each.
void resolve_select(const View& vectors, const View& bases, Shape shape, int k, int64_t ranges, int64_t* best,
                    Stream stream);

// labels, coefficients: [rows, k].
void resolve_erase(const View& vectors, const View& bases, Shape shape, const int64_t* labels, int k, double dependent,
                   const View& coefficients, const View& residual, Stream stream);

// Adds to counts: [n].
void nonfinite(const std::vector<View>& tensors, int64_t* counts, Stream stream);

}  // namespace seme::cuda
