// Counting keys in the bins of a window: zeros and keys beyond the window in registers, the others by atomics.
#pragma once

#include <algorithm>

#include "../formulas.h"
#include "tile.cuh"

namespace seme::cuda {

using Count = unsigned long long;

// As many thread blocks as the GPU runs at once: each adds what its registers hold a single time.
inline unsigned counting_grid(int64_t n, int device) {
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    return std::min(4 * unsigned(processors), ceil_div(n, kTile));
}

template <class C>
struct BinCounter {
    const Window<C> window;
    Count* const row;  // [kBins + 2]
    Count beyond = 0, mixed = 0, zeros = 0;

    __device__ BinCounter(const Window<C>& window, Count* row) : window(window), row(row) {}

    __device__ void add(typename C::Key key) {
        if (window.passed(key)) {
            ++beyond;
        } else if (window.holds(key)) {
            mixed += window.rest(key) != 0;
            if (key == 0)
                ++zeros;
            else
                atomicAdd(row + window.bin(key), Count(1));
        }
    }
    // One addition per warp. Every thread of the block has to call it.
    __device__ void finish() {
        for (int d = kWarp / 2; d > 0; d /= 2) {
            beyond += __shfl_down_sync(kAllLanes, beyond, d);
            zeros += __shfl_down_sync(kAllLanes, zeros, d);
            mixed += __shfl_down_sync(kAllLanes, mixed, d);
        }
        if (threadIdx.x % kWarp == 0) {
            if (beyond) atomicAdd(row + kBins, beyond);
            if (zeros) atomicAdd(row, zeros);
            if (mixed) atomicAdd(row + kBins + 1, mixed);
        }
    }
};

}  // namespace seme::cuda
