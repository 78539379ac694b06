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

// Reductions give one partial result per block of this many elements, so that their value depends on
// neither the chunk size nor the number of threads. Chunks begin at a multiple of it.
constexpr int64_t kBlock = 8192;

inline int64_t blocks(int64_t n) { return (n + kBlock - 1) / kBlock; }

namespace cpu {

void weighted_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, DType compute,
                  View out, int threads);

// out[blocks, n, n]
void inner_products(const std::vector<View>& tensors, DType compute, double* out, int threads);

// Adds to out[n]; with `zero`, writes 0 over what it counts.
void nonfinite(const std::vector<View>& tensors, bool zero, int64_t* out, int threads);

// Ops on task vectors: tensors[0] is the base, the n others have one entry each in the other vectors.
void task_vector_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, double scale,
                     DType compute, View out, int threads);

// Adds to out[n, kBins + 2].
void magnitude_histogram(const std::vector<View>& tensors, const std::vector<int64_t>& lowest,
                         const std::vector<int64_t>& shift, DType compute, int64_t* out, int threads);

// Adds to out[n].
void tie_counts(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, DType compute, int64_t* out,
                int threads);

void ties(const std::vector<View>& tensors, const std::vector<double>& weights, const std::vector<int64_t>& thresholds,
          const std::vector<int64_t>& tie_quotas, const std::vector<double>& factors, bool normalize, double scale,
          DType compute, View out, int threads);

// out[blocks, n, 2]
void trimmed_l1(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds,
                const std::vector<int64_t>& tie_quotas, DType compute, double* out, int threads);

}  // namespace cpu
}  // namespace seme
