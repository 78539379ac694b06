// The CUDA twins of the prototypes in ../seme.h: device addresses instead of host addresses, a stream instead of
// threads. They launch and return; an error is a std::runtime_error that names what CUDA said.
#pragma once

#include "../seme.h"

namespace seme::cuda {

// A stream of PyTorch (or 0, the default stream) and the device it belongs to.
struct Stream {
    int device;
    uintptr_t handle;
};

constexpr int kMaxTensors = 64;  // per call; their addresses and numbers travel as kernel arguments

// Elements per thread block of an element-wise kernel.
constexpr int64_t kTile = 2048;

void weighted_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, DType compute,
                  View out, Stream stream);

// Ops on task vectors: tensors[0] is the base.
void task_vector_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, double scale,
                     DType compute, View out, Stream stream);

// out: [blocks of kBlock, n, n].
void inner_products(const std::vector<View>& tensors, DType compute, double* out, Stream stream);

// Adds to counts: [n, 65538].
void magnitude_histogram(const std::vector<View>& tensors, const std::vector<int64_t>& lowest,
                         const std::vector<int>& shift, DType compute, int64_t* counts, Stream stream);

// counts: [n, blocks of `block` elements]: the keys of each block that equal the threshold of their tensor.
void block_ties(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, DType compute, int64_t block,
                int64_t* counts, Stream stream);

// Of the elements whose key equals the threshold, the first `quotas[i]` are kept. tie_ends: the running sums of
// block_ties() along the blocks (of kTile elements for ties, kBlock for trimmed_l1); null if no quota binds.
struct Selection {
    std::vector<int64_t> thresholds, quotas;
    const int64_t* tie_ends;
};

void ties(const std::vector<View>& tensors, const std::vector<double>& weights, const std::vector<double>& factors,
          const Selection& selection, bool normalize, double scale, DType compute, View out, Stream stream);

// out: [blocks of kBlock, n, 2].
void trimmed_l1(const std::vector<View>& tensors, const Selection& selection, DType compute, double* out,
                Stream stream);

// Adds to counts: [n].
void nonfinite(const std::vector<View>& tensors, int64_t* counts, Stream stream);

}  // namespace seme::cuda
