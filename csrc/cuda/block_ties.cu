#include "../formulas.h"
#include "selection.cuh"

namespace seme::cuda {
namespace {

// Thread block b counts elements [b * block, (b + 1) * block) for every threshold; `block` is a multiple of kTile.
template <class C>
__global__ void __launch_bounds__(kThreads)
    block_ties_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Cuts<C> cuts, int64_t* counts,
                      int64_t n, int64_t block) {
    __shared__ int total;
    for (int t = 0; t < cuts.per_tensor * cuts.count; ++t) {
        const typename C::Key tie = cuts.v[t].key;
        int found = 0;
        for (int64_t part = 0; part < block; part += kTile) {
            const int64_t at = int64_t(blockIdx.x) * block + part + threadIdx.x * kVector;
            const int count = at >= n ? 0 : n - at < kVector ? int(n - at) : kVector;
            typename C::T base[kVector], x[kVector];
            load_vector<C>(in[0], at, count, base);
            load_vector<C>(in[t % cuts.count + 1], at, count, x);
            for (int j = 0; j < kVector; ++j) found += j < count && C::key(TaskVector<C>::delta(x[j], base[j])) == tie;
        }
        if (threadIdx.x == 0) total = 0;
        __syncthreads();
        found = __reduce_add_sync(kAllLanes, found);
        if (threadIdx.x % kWarp == 0) atomicAdd(&total, found);
        __syncthreads();
        if (threadIdx.x == 0) counts[t * int64_t(gridDim.x) + blockIdx.x] = total;
    }
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, int64_t block,
                    int64_t* counts, cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        const Kept kept{{thresholds, std::vector<int64_t>(thresholds.size()), {}, {}, 0}, nullptr};
        launch(block_ties_kernel<C>, ceil_div(n, block), kThreads, 0, stream, inputs_of(tensors),
               Cuts<C>::make(kept, tensors.size(), 0), counts, n, block);
    }
};

}  // namespace

void block_ties(const std::vector<View>& tensors, const std::vector<int64_t>& thresholds, DType compute, int64_t block,
                int64_t* counts, Stream stream) {
    if (tensors[0].n > 0 && tensors.size() > 1)
        run_computed<Launch>(compute, tensors, thresholds, block, counts, use(stream));
}

}  // namespace seme::cuda
