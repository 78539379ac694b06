#include "../formulas.h"
#include "tile.cuh"

namespace seme::cuda {
namespace {

// The sum of the warp's 64 lanes by halving: lane j takes lane j + 32, then j + 16, ... j + 1. Valid in thread 0.
__device__ __forceinline__ double fold_pairs(double (&lanes)[2]) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2)
        for (int k = 0; k < 2; ++k) lanes[k] += __shfl_down_sync(kAllLanes, lanes[k], d);
    return lanes[0] + lanes[1];
}

template <class C>
__device__ __forceinline__ typename C::T load_one(const Input& in, int64_t at) {
    typename C::T y[kVector];
    load_vector<C>(in, at, 1, y);
    return y[0];
}

// One warp per block of elements, two of the 64 lanes of summation per thread. Blocks may be of any length, so elements
// are read one by one. A pair of tensors is read once for its three products.
template <class C>
__global__ void __launch_bounds__(kThreads)
    line_products_kernel(const __grid_constant__ Inputs in, bool relative, int64_t length, double* out, int64_t n,
                         int64_t blocks) {
    const int64_t block = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int thread = threadIdx.x % kWarp;
    if (block >= blocks) return;
    const int skipped = relative ? 1 : 0, count = in.count - skipped;
    const int64_t first = block * length, end = first + length < n ? first + length : n;
    double* matrix = out + block * count * count;
    const bool single = count == 1;
    for (int i = 0; i < count; ++i)
        for (int j = single ? 0 : i + 1; j < count; ++j) {
            double xx[2] = {0, 0}, xy[2] = {0, 0}, yy[2] = {0, 0};
            for (int k = 0; k < 2; ++k)
                for (int64_t at = first + 2 * thread + k; at < end; at += 2 * kWarp) {
                    auto x = load_one<C>(in[i + skipped], at), y = load_one<C>(in[j + skipped], at);
                    if (relative) {
                        const auto b = load_one<C>(in[0], at);
                        x = TaskVector<C>::delta(x, b);
                        y = TaskVector<C>::delta(y, b);
                    }
                    xx[k] += double(x) * double(x);
                    xy[k] += double(x) * double(y);
                    yy[k] += double(y) * double(y);
                }
            const double cross = fold_pairs(xy), squared = fold_pairs(xx), second = fold_pairs(yy);
            if (thread == 0) {
                matrix[i * count + i] = squared;
                matrix[i * count + j] = cross;
                matrix[j * count + i] = cross;
                matrix[j * count + j] = second;
            }
        }
}

// One thread per block and column; out is [blocks, count, count, columns].
template <class C>
__global__ void __launch_bounds__(kThreads)
    column_products_kernel(const __grid_constant__ Inputs in, bool relative, int64_t length, int64_t columns,
                           double* out, int64_t n, int64_t all) {
    const int64_t number = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (number >= all) return;
    const int64_t block = number / columns, column = number % columns;
    const int skipped = relative ? 1 : 0, count = in.count - skipped;
    const int64_t first = block * length, end = first + length < n ? first + length : n;
    double* matrix = out + block * count * count * columns + column;
    for (int i = 0; i < count; ++i)
        for (int j = i; j < count; ++j) {
            double sum = 0;
            for (int64_t at = first + column; at < end; at += columns) {
                auto x = load_one<C>(in[i + skipped], at), y = load_one<C>(in[j + skipped], at);
                if (relative) {
                    const auto b = load_one<C>(in[0], at);
                    x = TaskVector<C>::delta(x, b);
                    y = TaskVector<C>::delta(y, b);
                }
                sum += double(x) * double(y);
            }
            matrix[(i * count + j) * columns] = matrix[(j * count + i) * columns] = sum;
        }
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, bool relative, int64_t block, int64_t columns, double* out,
                    cudaStream_t stream) {
        const int64_t n = tensors[0].n, all = (n + block - 1) / block;
        if (columns > 0)
            launch(column_products_kernel<C>, ceil_div(all * columns, kThreads), kThreads, 0, stream,
                   inputs_of(tensors), relative, block, columns, out, n, all * columns);
        else
            launch(line_products_kernel<C>, ceil_div(all, kThreads / kWarp), kThreads, 0, stream, inputs_of(tensors),
                   relative, block, out, n, all);
    }
};

}  // namespace

void line_products(const std::vector<View>& tensors, bool relative, int64_t block, int64_t columns, DType compute,
                   double* out, Stream stream) {
    if (tensors[0].n > 0) run_computed<Launch>(compute, tensors, relative, block, columns, out, use(stream));
}

}  // namespace seme::cuda
