#include <cmath>

#include "tile.cuh"

namespace seme::cuda {
namespace {

constexpr double kEpsilon = 1e-8;

template <class C>
__device__ __forceinline__ double element(const Input& in, int64_t at) {
    typename C::T y[kVector];
    load_vector<C>({static_cast<const char*>(in.data) + at * (in.dtype == DType::F64   ? 8
                                                              : in.dtype == DType::F32 ? 4
                                                                                       : 2),
                    in.dtype, false},
                   0, 1, y);
    return double(y[0]);
}

template <class C>
__device__ __forceinline__ double shorten(double x, bool rounded) {
    return rounded ? double(C::round(typename C::T(x))) : x;
}

__device__ __forceinline__ double greatest_of_warp(double x) {
    for (int d = kWarp / 2; d > 0; d /= 2) {
        const double other = __shfl_down_sync(kAllLanes, x, d);
        x = other > x ? other : x;
    }
    return __shfl_sync(kAllLanes, x, 0);
}

__device__ __forceinline__ double sum_of_warp(double x) {
    for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_down_sync(kAllLanes, x, d);
    return __shfl_sync(kAllLanes, x, 0);
}

// One warp per row, in three turns.
template <class C>
__global__ void __launch_bounds__(kThreads)
    row_divergence_kernel(const __grid_constant__ Inputs in, int64_t row, bool rounded, double* out, int64_t rows) {
    const int64_t r = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int thread = threadIdx.x % kWarp;
    if (r >= rows) return;
    double top[2], total[2];
    for (int i = 0; i < 2; ++i) {
        top[i] = -INFINITY;
        for (int64_t j = thread; j < row; j += kWarp) {
            const double x = element<C>(in[i], r * row + j);
            top[i] = x > top[i] ? x : top[i];
        }
        top[i] = greatest_of_warp(top[i]);
        total[i] = 0;
        for (int64_t j = thread; j < row; j += kWarp) total[i] += exp(element<C>(in[i], r * row + j) - top[i]);
        total[i] = sum_of_warp(total[i]);
    }
    double found = 0;
    for (int64_t j = thread; j < row; j += kWarp) {
        double share[2];
        for (int i = 0; i < 2; ++i) {
            const double e = exp(element<C>(in[i], r * row + j) - top[i]) / total[i];
            share[i] = shorten<C>(shorten<C>(e, rounded) + kEpsilon, rounded);
        }
        const double logarithm = shorten<C>(log(shorten<C>(share[1] / share[0], rounded)), rounded);
        found += shorten<C>(share[1] * logarithm, rounded);
    }
    found = sum_of_warp(found);
    if (thread == 0) out[r] = rounded ? shorten<C>(found, true) : found < 0 ? 0.0 : found;
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, int64_t row, bool rounded, double* out, cudaStream_t stream) {
        const int64_t rows = tensors[0].n / row;
        launch(row_divergence_kernel<C>, ceil_div(rows, kThreads / kWarp), kThreads, 0, stream, inputs_of(tensors), row,
               rounded, out, rows);
    }
};

}  // namespace

void row_divergence(const std::vector<View>& tensors, int64_t row, bool rounded, DType compute, double* out,
                    Stream stream) {
    if (tensors[0].n > 0) run_computed<Launch>(compute, tensors, row, rounded, out, use(stream));
}

}  // namespace seme::cuda
