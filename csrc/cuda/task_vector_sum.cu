#include "../formulas.h"
#include "tile.cuh"

namespace seme::cuda {
namespace {

template <class C>
__global__ void __launch_bounds__(kThreads)
    task_vector_sum_kernel(const __grid_constant__ Inputs in, const __grid_constant__ PerTensor<typename C::T> weights,
                           typename C::T divisor, typename C::T scale, Output out, int64_t n) {
    using F = TaskVectorSum<C>;
    const Share share(n);
    if (share.count == 0) return;
    typename C::T base[kVector], x[kVector], sum[kVector];
    load_vector<C>(in[0], share.at, share.count, base);
    for (int i = 1; i < in.count; ++i) {
        load_vector<C>(in[i], share.at, share.count, x);
        for (int j = 0; j < kVector; ++j) {
            const typename C::T term = F::term(weights[i - 1], TaskVector<C>::delta(x[j], base[j]));
            sum[j] = i == 1 ? term : sum[j] + term;
        }
    }
    if (in.count > 1)
        for (int j = 0; j < kVector; ++j) base[j] = F::finish(base[j], sum[j], divisor, scale);
    store_vector(base, out, share.at, share.count);
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, double scale,
                    View out, cudaStream_t stream) {
        using T = typename C::T;
        launch(task_vector_sum_kernel<C>, ceil_div(out.n, kTile), kThreads, 0, stream, inputs_of(tensors),
               per_tensor<T>(weights), T(divisor), T(scale), output_of(out), out.n);
    }
};

}  // namespace

void task_vector_sum(const std::vector<View>& tensors, const std::vector<double>& weights, double divisor, double scale,
                     DType compute, View out, Stream stream) {
    if (out.n > 0) run_computed<Launch>(compute, tensors, weights, divisor, scale, out, use(stream));
}

}  // namespace seme::cuda
