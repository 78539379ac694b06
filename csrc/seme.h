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

}  // namespace cpu
}  // namespace seme
