#include "variance.cuh"

namespace seme::cuda {
namespace {

// The sums of the terms that agree are kept for both signs (0: plus, 1: minus), as in ties.cu.
template <class C>
__global__ void __launch_bounds__(kThreads)
    sce_kernel(const __grid_constant__ Inputs in, const __grid_constant__ PerTensor<typename C::T> coefficients,
               const __grid_constant__ Cuts<C> cuts, bool everything, Output out, int64_t n) {
    using T = typename C::T;
    const Share share(n);  // no early return: all threads of the block take part in sum_before
    const Deltas<C> deltas(in, share.at, share.count);
    const BlockCut<C> cut(cuts, 0, 0, blockIdx.x);
    bool keep[kVector];
    T d[kVector], sum[kVector] = {}, num[2][kVector] = {}, den[2][kVector] = {};
    if (!everything) variance_of<C>(in.count - 1, deltas, d);
    int rank = 0;
    if (cut.ranked) {
        for (int j = 0; j < kVector; ++j) rank += C::key(d[j]) == cut.tie;
        rank = sum_before(rank);
    }
    for (int j = 0; j < kVector; ++j) {
        const typename C::Key key = everything ? 0 : C::key(d[j]);
        rank += key == cut.tie;
        keep[j] = everything || cut.passes(key, rank);
    }
    for (int i = 0; i < in.count - 1; ++i) {
        const T coefficient = coefficients[i];
        deltas(i, d);
        for (int j = 0; j < kVector; ++j) {
            d[j] = keep_if(keep[j], d[j]);
            sum[j] += d[j];
            const T term = Sce<C>::term(coefficient, d[j]);
            for (int s = 0; s < 2; ++s) {
                const T agrees = Ties<C>::agrees(d[j], s == 0 ? T(1) : T(-1));
                num[s][j] += term * agrees;
                den[s][j] += coefficient * agrees;
            }
        }
    }
    T merged[kVector];
    for (int j = 0; j < kVector; ++j) {
        const bool plus = Ties<C>::sign(sum[j]) > T(0);
        merged[j] = Sce<C>::finish(deltas.base[j], plus ? num[0][j] : num[1][j], plus ? den[0][j] : den[1][j]);
    }
    store_vector(merged, out, share.at, share.count);
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const std::vector<double>& coefficients, const Kept& kept,
                    View out, cudaStream_t stream) {
        const unsigned grid = ceil_div(out.n, kTile);
        launch(sce_kernel<C>, grid, kThreads, 0, stream, inputs_of(tensors), per_tensor<typename C::T>(coefficients),
               Cuts<C>::make(kept, 2, grid), selects_everything(kept), output_of(out), out.n);
    }
};

}  // namespace

void sce(const std::vector<View>& tensors, const std::vector<double>& coefficients, const Kept& kept, DType compute,
         View out, Stream stream) {
    if (out.n > 0) run_computed<Launch>(compute, tensors, coefficients, kept, out, use(stream));
}

}  // namespace seme::cuda
