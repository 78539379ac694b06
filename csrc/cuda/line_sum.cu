#include "../formulas.h"
#include "weights.cuh"

namespace seme::cuda {
namespace {

template <class C>
__global__ void __launch_bounds__(kThreads)
    line_sum_kernel(const __grid_constant__ Inputs in, bool relative,
                    const __grid_constant__ WeightTable<typename C::T> weights, Output out, int64_t n) {
    using F = LineSum<C>;
    const Share share(n);
    if (share.count == 0) return;
    const int skipped = relative ? 1 : 0;
    typename C::T base[kVector], x[kVector], w[kVector], sum[kVector] = {};
    load_vector<C>(in[0], share.at, share.count, base);
    for (int i = 0; i + skipped < in.count; ++i) {
        load_vector<C>(in[i + skipped], share.at, share.count, x);
        weights.load(i, share.at, share.count, w);
        for (int j = 0; j < kVector; ++j)
            sum[j] += relative ? F::relative_term(w[j], TaskVector<C>::delta(x[j], base[j])) : F::term(w[j], x[j]);
    }
    for (int j = 0; j < kVector; ++j) {
        sum[j] = C::round(sum[j]);
        if (relative) sum[j] = TaskVector<C>::add(base[j], sum[j]);
    }
    store_vector(sum, out, share.at, share.count);
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, bool relative, const std::vector<double>& weights,
                    const Weights& sets, View out, cudaStream_t stream) {
        using T = typename C::T;
        launch(line_sum_kernel<C>, ceil_div(out.n, kTile), kThreads, 0, stream, inputs_of(tensors), relative,
               WeightTable<T>{per_tensor<T>(weights), sets}, output_of(out), out.n);
    }
};

}  // namespace

void line_sum(const std::vector<View>& tensors, bool relative, const std::vector<double>& weights, const Weights& sets,
              DType compute, View out, Stream stream) {
    if (out.n > 0) run_computed<Launch>(compute, tensors, relative, weights, sets, out, use(stream));
}

}  // namespace seme::cuda
