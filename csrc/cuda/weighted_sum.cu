#include "../formulas.h"
#include "tile.cuh"

namespace seme::cuda {
namespace {

template <class C>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_kernel(const __grid_constant__ Inputs in, const __grid_constant__ PerTensor<typename C::T> weights,
                        typename C::T divisor, Output out, int64_t n) {
    using F = WeightedSum<C>;
    const Share share(n);
    if (share.count == 0) return;
    typename C::T sum[kVector], x[kVector];
    load_vector<C>(in[0], share.at, share.count, x);
    for (int j = 0; j < kVector; ++j) sum[j] = F::first(weights[0], x[j]);
    for (int i = 1; i < in.count; ++i) {
        load_vector<C>(in[i], share.at, share.count, x);
        for (int j = 0; j < kVector; ++j) sum[j] = F::add(sum[j], weights[i], x[j]);
    }
    for (int j = 0; j < kVector; ++j) sum[j] = F::finish(sum[j], divisor);
    store_vector(sum, out, share.at, share.count);
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, View out,
                    cudaStream_t stream) {
        using T = typename C::T;
        launch(weighted_sum_kernel<C>, ceil_div(out.n, kTile), kThreads, 0, stream, inputs_of(tensors),
               per_tensor<T>(weights), T(divisor), output_of(out), out.n);
    }
};

}  // namespace

void weighted_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, DType compute,
                  View out, Stream stream) {
    if (out.n > 0) run_computed<Launch>(compute, tensors, weights, divisor, out, use(stream));
}

}  // namespace seme::cuda
