#include "../formulas.h"
#include "tile.cuh"

namespace seme::cuda {
namespace {

// y[0..kVector) = elements [at, at + count) of vector i: of tensor i, or of what it adds to the base.
template <class C>
__device__ __forceinline__ void load_part(const Inputs& in, bool relative, int i, int64_t at, int count,
                                          typename C::T (&y)[kVector]) {
    load_vector<C>(in[relative ? i + 1 : i], at, count, y);
    if (!relative) return;
    typename C::T base[kVector];
    load_vector<C>(in[0], at, count, base);
#pragma unroll
    for (int k = 0; k < kVector; ++k) y[k] = TaskVector<C>::delta(y[k], base[k]);
}

// One team per block of elements. A pair of tensors is read once for its three products.
template <class C>
__global__ void __launch_bounds__(kThreads)
    line_products_kernel(const __grid_constant__ Inputs in, bool relative, int64_t length, double* out, int64_t n,
                         int64_t blocks) {
    const Team team(blocks);
    const int count = relative ? in.count - 1 : in.count;
    const int64_t first = team.block * length, end = first + length < n ? first + length : n;
    double* matrix = out + team.block * count * count;
    const bool single = count == 1;
    for (int i = 0; i < count; ++i)
        for (int j = single ? 0 : i + 1; j < count; ++j) {
            double xx[kVector] = {}, xy[kVector] = {}, yy[kVector] = {};
            for (int64_t at = first + team.thread * kVector; at < end; at += kRow) {
                const int here = end - at < kVector ? int(end - at) : kVector;
                typename C::T x[kVector], y[kVector];
                load_part<C>(in, relative, i, at, here, x);
                load_part<C>(in, relative, j, at, here, y);
#pragma unroll
                for (int k = 0; k < kVector; ++k) {
                    const double a = double(x[k]), b = double(y[k]);
                    xx[k] += a * a;
                    xy[k] += a * b;
                    yy[k] += b * b;
                }
            }
            const double cross = fold_lanes(xy), squared = fold_lanes(xx), second = fold_lanes(yy);
            if (team.first) {
                matrix[i * count + i] = squared;
                matrix[i * count + j] = cross;
                matrix[j * count + i] = cross;
                matrix[j * count + j] = second;
            }
        }
}

// One thread per block and kVector columns, of which there are `groups`; out is [blocks, count, count, columns].
template <class C>
__global__ void __launch_bounds__(kThreads)
    column_products_kernel(const __grid_constant__ Inputs in, bool relative, int64_t length, int64_t columns,
                           double* out, int64_t n, int64_t groups, int64_t all) {
    const int64_t number = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (number >= all) return;
    const int64_t block = number / groups, column = number % groups * kVector;
    const int width = columns - column < kVector ? int(columns - column) : kVector;
    const int count = relative ? in.count - 1 : in.count;
    const int64_t first = block * length, end = first + length < n ? first + length : n;
    double* matrix = out + block * count * count * columns + column;
    for (int i = 0; i < count; ++i)
        for (int j = i; j < count; ++j) {
            double sum[kVector] = {};
            for (int64_t at = first + column; at < end; at += columns) {
                typename C::T x[kVector], y[kVector];
                load_part<C>(in, relative, i, at, width, x);
                load_part<C>(in, relative, j, at, width, y);
#pragma unroll
                for (int k = 0; k < kVector; ++k) sum[k] += double(x[k]) * double(y[k]);
            }
            for (int k = 0; k < width; ++k)
                matrix[(i * count + j) * columns + k] = matrix[(j * count + i) * columns + k] = sum[k];
        }
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, bool relative, int64_t block, int64_t columns, double* out,
                    cudaStream_t stream) {
        const int64_t n = tensors[0].n, all = (n + block - 1) / block;
        Inputs in = inputs_of(tensors);
        if (block % kVector != 0 || columns % kVector != 0)  // of later blocks and rows the addresses are not
            for (Input& each : in.v) each.aligned = false;
        if (columns > 0) {
            const int64_t groups = (columns + kVector - 1) / kVector;
            launch(column_products_kernel<C>, ceil_div(all * groups, kThreads), kThreads, 0, stream, in, relative,
                   block, columns, out, n, groups, all * groups);
        } else {
            launch(line_products_kernel<C>, ceil_div(all, kThreads / kTeam), kThreads, 0, stream, in, relative, block,
                   out, n, all);
        }
    }
};

}  // namespace

void line_products(const std::vector<View>& tensors, bool relative, int64_t block, int64_t columns, DType compute,
                   double* out, Stream stream) {
    if (tensors[0].n > 0) run_computed<Launch>(compute, tensors, relative, block, columns, out, use(stream));
}

}  // namespace seme::cuda
