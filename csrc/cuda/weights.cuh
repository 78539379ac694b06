// Weights as the kernels look them up: one per tensor, as kernel arguments, or one per row or column, in memory.
#pragma once

#include "tile.cuh"

namespace seme::cuda {

template <class T>
struct WeightTable {
    PerTensor<T> plain;
    Weights sets;

    // w[0..kVector) = the weights of tensor i at elements [at, at + count).
    __device__ __forceinline__ void load(int i, int64_t at, int count, T (&w)[kVector]) const {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            w[j] = sets.values == nullptr ? plain[i] : j < count ? T(*sets.of(i, at + j)) : T(0);
    }
};

}  // namespace seme::cuda
