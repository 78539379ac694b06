#include "variance.cuh"

namespace seme::cuda {
namespace {

// Thread block b counts elements [b * block, (b + 1) * block); `block` is a multiple of kTile.
template <class C>
__global__ void __launch_bounds__(kThreads) variance_ties_kernel(const __grid_constant__ Inputs in, typename C::Key tie,
                                                                 int64_t* counts, int64_t n, int64_t block) {
    __shared__ int total;
    int found = 0;
    for (int64_t part = 0; part < block; part += kTile) {
        const int64_t at = int64_t(blockIdx.x) * block + part + threadIdx.x * kVector;
        const int count = at >= n ? 0 : n - at < kVector ? int(n - at) : kVector;
        typename C::T v[kVector];
        variance_of<C>(in.count - 1, Deltas<C>(in, at, count), v);
        for (int j = 0; j < kVector; ++j) found += j < count && C::key(v[j]) == tie;
    }
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    found = __reduce_add_sync(kAllLanes, found);
    if (threadIdx.x % kWarp == 0) atomicAdd(&total, found);
    __syncthreads();
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, int64_t threshold, int64_t block, int64_t* counts,
                    cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        launch(variance_ties_kernel<C>, ceil_div(n, block), kThreads, 0, stream, inputs_of(tensors),
               key_bound<C>(threshold), counts, n, block);
    }
};

}  // namespace

void variance_ties(const std::vector<View>& tensors, int64_t threshold, DType compute, int64_t block, int64_t* counts,
                   Stream stream) {
    if (tensors[0].n > 0) run_computed<Launch>(compute, tensors, threshold, block, counts, use(stream));
}

}  // namespace seme::cuda
