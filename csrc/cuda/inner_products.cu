#include "tile.cuh"

namespace seme::cuda {
namespace {

// One team per block of kBlock elements. A pair of tensors is read once for its three products; of more than two
// tensors, the block is in the cache when the next pair reads it.
template <class C>
__global__ void __launch_bounds__(kThreads)
    inner_products_kernel(const __grid_constant__ Inputs in, double* out, int64_t n, int64_t blocks) {
    const Team team(blocks);
    double* matrix = out + team.block * in.count * in.count;
    const bool single = in.count == 1;
    for (int i = 0; i < in.count; ++i)
        for (int j = single ? 0 : i + 1; j < in.count; ++j) {
            double xx[kVector] = {}, xy[kVector] = {}, yy[kVector] = {};
            const int64_t begin = team.block * kBlock + team.thread * kVector;
            for (int64_t at = begin; at < begin + kBlock; at += kRow * kRows) {
                typename C::T x[kRows][kVector], y[kRows][kVector];
                load_rows<C>(in[i], at, n - at, x);
                load_rows<C>(in[j], at, n - at, y);
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    for (int k = 0; k < kVector; ++k) {
                        const double a = double(x[r][k]), b = double(y[r][k]);
                        xx[k] += a * a;
                        xy[k] += a * b;
                        yy[k] += b * b;
                    }
            }
            const double cross = fold_lanes(xy), first = fold_lanes(xx), second = fold_lanes(yy);
            if (team.first) {
                matrix[i * in.count + i] = first;
                matrix[i * in.count + j] = cross;
                matrix[j * in.count + i] = cross;
                matrix[j * in.count + j] = second;
            }
        }
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, double* out, cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        launch(inner_products_kernel<C>, ceil_div(blocks(n), kThreads / kTeam), kThreads, 0, stream, inputs_of(tensors),
               out, n, blocks(n));
    }
};

}  // namespace

void inner_products(const std::vector<View>& tensors, DType compute, double* out, Stream stream) {
    if (tensors[0].n > 0) run_computed<Launch>(compute, tensors, out, use(stream));
}

}  // namespace seme::cuda
