#include "deltas.cuh"
#include "histogram.cuh"

namespace seme::cuda {
namespace {

// count[0..kVector) = how many of the task vectors change each element.
template <class C>
__device__ __forceinline__ void count_changes(const Deltas<C>& deltas, typename C::T epsilon,
                                              typename C::T (&count)[kVector]) {
    using T = typename C::T;
    T d[kVector];
    for (int j = 0; j < kVector; ++j) count[j] = T(0);
    for (int i = 0; i < deltas.in.count - 1; ++i) {
        deltas(i, d);
        for (int j = 0; j < kVector; ++j) count[j] += keep_if(Ram<C>::changes(d[j], epsilon), T(1));
    }
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    ram_kernel(const __grid_constant__ Inputs in, const __grid_constant__ PerTensor<typename C::T> scales,
               typename C::T epsilon, bool rounded, Output out, int64_t n) {
    using T = typename C::T;
    const Share share(n);
    if (share.count == 0) return;
    const Deltas<C> deltas(in, share.at, share.count);
    T count[kVector], d[kVector], sum[kVector] = {};
    count_changes(deltas, epsilon, count);
    for (int i = 0; i < in.count - 1; ++i) {
        deltas(i, d);
        for (int j = 0; j < kVector; ++j) {
            const T models = count[j] > T(1) ? count[j] : T(1);
            sum[j] += Ram<C>::term(d[j], Ram<C>::changes(d[j], epsilon), models, scales[i]);
        }
    }
    for (int j = 0; j < kVector; ++j) sum[j] = Ram<C>::finish(deltas.base[j], sum[j], rounded);
    store_vector(sum, out, share.at, share.count);
}

// Adds (changed by others too, changed by this one alone) to counts[models, 2], which each block first sums up by
// itself.
template <class C>
__global__ void __launch_bounds__(kThreads)
    overlap_counts_kernel(const __grid_constant__ Inputs in, typename C::T epsilon, Count* counts, int64_t n) {
    using T = typename C::T;
    __shared__ int totals[2 * kMaxTensors];
    for (int i = threadIdx.x; i < 2 * kMaxTensors; i += kThreads) totals[i] = 0;
    __syncthreads();
    const Share share(n);  // no early return: all threads of a warp take part in the sums
    const Deltas<C> deltas(in, share.at, share.count);
    T count[kVector], d[kVector];
    count_changes(deltas, epsilon, count);
    for (int i = 0; i < in.count - 1; ++i) {
        deltas(i, d);
        int shared = 0, alone = 0;
        for (int j = 0; j < share.count; ++j) {
            const bool changed = Ram<C>::changes(d[j], epsilon);
            shared += changed && count[j] > T(1);
            alone += changed && !(count[j] > T(1));
        }
        shared = __reduce_add_sync(kAllLanes, shared);
        alone = __reduce_add_sync(kAllLanes, alone);
        if (threadIdx.x % kWarp == 0) {
            atomicAdd(&totals[2 * i], shared);
            atomicAdd(&totals[2 * i + 1], alone);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * (in.count - 1); i += kThreads)
        if (totals[i]) atomicAdd(counts + i, Count(totals[i]));
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const std::vector<double>& scales, double epsilon, bool rounded,
                    View out, cudaStream_t stream) {
        using T = typename C::T;
        launch(ram_kernel<C>, ceil_div(out.n, kTile), kThreads, 0, stream, inputs_of(tensors), per_tensor<T>(scales),
               T(epsilon), rounded, output_of(out), out.n);
    }
};

template <class C>
struct LaunchCounts {
    static void run(const std::vector<View>& tensors, double epsilon, int64_t* counts, cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        launch(overlap_counts_kernel<C>, ceil_div(n, kTile), kThreads, 0, stream, inputs_of(tensors),
               typename C::T(epsilon), reinterpret_cast<Count*>(counts), n);
    }
};

}  // namespace

void ram(const std::vector<View>& tensors, const std::vector<double>& scales, double epsilon, bool rounded,
         DType compute, View out, Stream stream) {
    if (out.n > 0) run_computed<Launch>(compute, tensors, scales, epsilon, rounded, out, use(stream));
}

void overlap_counts(const std::vector<View>& tensors, double epsilon, DType compute, int64_t* counts, Stream stream) {
    if (tensors[0].n > 0) run_computed<LaunchCounts>(compute, tensors, epsilon, counts, use(stream));
}

}  // namespace seme::cuda
