#include <algorithm>

#include "../formulas.h"
#include "tile.cuh"

namespace seme::cuda {
namespace {

using Count = unsigned long long;
constexpr int64_t kColumns = kBins + 2;  // the bins, keys beyond the window, keys that are not the first of their bin
constexpr int kHistogramThreads = 1024;
constexpr int64_t kHistogramTile = int64_t(kHistogramThreads) * kVector;
constexpr int64_t kWorthShared = 1 << 20;  // elements; for fewer, clearing shared memory costs more than it saves

template <class C>
using Windows = PerTensor<Window<C>>;

// Block (x, i) counts its part of task vector i. The first `shared_bins` bins (all that a 15-bit key can have) are
// counted in shared memory, the others by atomics on `counts`; zeros and keys beyond the window in registers.
template <class C>
__global__ void __launch_bounds__(kHistogramThreads)
    magnitude_histogram_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Windows<C> windows,
                               Count* counts, int64_t n, int shared_bins) {
    SEME_DYNAMIC_SHARED(uint32_t, shared);
    const Window<C> window = windows[blockIdx.y];
    Count* row = counts + blockIdx.y * kColumns;
    for (int b = threadIdx.x; b < shared_bins; b += kHistogramThreads) shared[b] = 0;
    __syncthreads();

    Count beyond = 0, mixed = 0, zeros = 0;
    const int64_t step = kHistogramTile * gridDim.x;
    for (int64_t at = (int64_t(blockIdx.x) * kHistogramThreads + threadIdx.x) * kVector; at < n; at += step) {
        const int count = n - at < kVector ? int(n - at) : kVector;
        typename C::T base[kVector], x[kVector];
        load_vector<C>(in[0], at, count, base);
        load_vector<C>(in[blockIdx.y + 1], at, count, x);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const typename C::Key key = C::key(TaskVector<C>::delta(x[j], base[j]));
            if (j >= count) continue;
            if (window.passed(key)) {
                ++beyond;
            } else if (window.holds(key)) {
                mixed += window.rest(key) != 0;
                const int64_t bin = window.bin(key);
                if (key == 0)
                    ++zeros;
                else if (bin < shared_bins)
                    atomicAdd(shared + bin, 1u);
                else
                    atomicAdd(row + bin, Count(1));
            }
        }
    }

    // One addition per warp where the registers hold something.
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
    __syncthreads();
    for (int b = threadIdx.x; b < shared_bins; b += kHistogramThreads)
        if (shared[b]) atomicAdd(row + b, Count(shared[b]));
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const std::vector<int64_t>& lowest, const std::vector<int>& shift,
                    int64_t* counts, int device, cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        Windows<C> windows{};
        for (size_t i = 0; i < lowest.size(); ++i) windows.v[i] = Window<C>::make(lowest[i], shift[i]);
        int processors = 0, shared_bytes = 0;
        check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
        check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        int shared_bins = 0;
        if (n >= kWorthShared) shared_bins = std::min(1 << 15, shared_bytes / int(sizeof(uint32_t)));
        shared_bytes = shared_bins * int(sizeof(uint32_t));
        auto kernel = magnitude_histogram_kernel<C>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
        const dim3 grid(std::min(unsigned(processors), ceil_div(n, kHistogramTile)), unsigned(lowest.size()));
        launch(kernel, grid, kHistogramThreads, shared_bytes, stream, inputs_of(tensors), windows,
               reinterpret_cast<Count*>(counts), n, shared_bins);
    }
};

}  // namespace

void magnitude_histogram(const std::vector<View>& tensors, const std::vector<int64_t>& lowest,
                         const std::vector<int>& shift, DType compute, int64_t* counts, Stream stream) {
    if (tensors[0].n > 0 && tensors.size() > 1)
        run_computed<Launch>(compute, tensors, lowest, shift, counts, stream.device, use(stream));
}

}  // namespace seme::cuda
