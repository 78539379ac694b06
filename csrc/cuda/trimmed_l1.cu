#include "../formulas.h"
#include "selection.cuh"

namespace seme::cuda {
namespace {

// Ties of this row of 64 elements in the threads before this one, and in the whole row, given the two of this thread.
__device__ __forceinline__ int row_ties_before(const bool (&tie)[2], int* whole) {
    const unsigned first = __ballot_sync(kAllLanes, tie[0]), second = __ballot_sync(kAllLanes, tie[1]);
    const unsigned before = (1u << (threadIdx.x % kWarp)) - 1u;
    *whole = __popc(first) + __popc(second);
    return __popc(first & before) + __popc(second & before);
}

// One warp per block of kBlock elements.
template <class C>
__global__ void __launch_bounds__(kThreads)
    trimmed_l1_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Thresholds<C> thresholds, double* out,
                      int64_t n, int64_t blocks) {
    const int64_t block = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int thread = threadIdx.x % kWarp;
    if (block >= blocks) return;
    for (int i = 0; i < in.count - 1; ++i) {
        const BlockSelection<C> selection(thresholds, i, block);
        double all[2] = {0, 0}, kept[2] = {0, 0};
        int seen = 0;  // ties in the rows before
        for (int64_t at = block * kBlock + 2 * thread; at < (block + 1) * kBlock; at += kRow * kRows) {
            typename C::T base[kRows][2], x[kRows][2];
            load_rows<C>(in[0], at, n - at, base);
            load_rows<C>(in[i + 1], at, n - at, x);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                typename C::Key key[2];
                int rank = seen;
                for (int k = 0; k < 2; ++k) {
                    x[r][k] = TaskVector<C>::delta(x[r][k], base[r][k]);
                    key[k] = C::key(x[r][k]);
                }
                if (selection.ranked) {  // the same for the whole warp
                    const bool tie[2] = {key[0] == selection.tie, key[1] == selection.tie};
                    int whole;
                    rank += row_ties_before(tie, &whole);
                    seen += whole;
                }
                for (int k = 0; k < 2; ++k) {
                    rank += key[k] == selection.tie;
                    const double size = double(x[r][k] < 0 ? -x[r][k] : x[r][k]);
                    all[k] += size;
                    kept[k] += selection.keeps(key[k], rank) ? size : 0.0;
                }
            }
        }
        const double whole = fold_lanes(all), part = fold_lanes(kept);
        if (thread == 0) {
            double* entry = out + (block * (in.count - 1) + i) * 2;
            entry[0] = whole;
            entry[1] = part;
        }
    }
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const Selection& selection, double* out, cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        launch(trimmed_l1_kernel<C>, ceil_div(blocks(n), kThreads / kWarp), kThreads, 0, stream, inputs_of(tensors),
               Thresholds<C>::make(selection, blocks(n)), out, n, blocks(n));
    }
};

}  // namespace

void trimmed_l1(const std::vector<View>& tensors, const Selection& selection, DType compute, double* out,
                Stream stream) {
    if (tensors[0].n > 0) run_computed<Launch>(compute, tensors, selection, out, use(stream));
}

}  // namespace seme::cuda
