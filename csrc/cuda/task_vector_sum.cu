#include "../formulas.h"
#include "selection.cuh"

namespace seme::cuda {
namespace {

template <class C>
struct Factors {
    using T = typename C::T;
    PerTensor<T> weights, factors;
    T divisor, scale;
};

template <class C>
__global__ void __launch_bounds__(kThreads)
    task_vector_sum_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Factors<C> factors,
                           const __grid_constant__ Cuts<C> cuts, Output out, int64_t n) {
    using V = TaskVector<C>;
    const Share share(n);  // no early return: all threads of the block take part in keep
    typename C::T base[kVector], x[kVector], sum[kVector];
    load_vector<C>(in[0], share.at, share.count, base);
    for (int i = 1; i < in.count; ++i) {
        load_vector<C>(in[i], share.at, share.count, x);
        for (int j = 0; j < kVector; ++j) x[j] = V::delta(x[j], base[j]);
        keep(cuts, i - 1, share.at, x);
        for (int j = 0; j < kVector; ++j) {
            const typename C::T term = V::term(factors.weights[i - 1], x[j], factors.factors[i - 1]);
            sum[j] = i == 1 ? term : sum[j] + term;
        }
    }
    if (in.count > 1)
        for (int j = 0; j < kVector; ++j)
            base[j] = TaskVectorSum<C>::finish(base[j], sum[j], factors.divisor, factors.scale);
    store_vector(base, out, share.at, share.count);
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const std::vector<double>& weights,
                    const std::vector<double>& factors, const Kept& kept, double divisor, double scale, View out,
                    cudaStream_t stream) {
        using T = typename C::T;
        const unsigned grid = ceil_div(out.n, kTile);
        const Factors<C> f{per_tensor<T>(weights), per_tensor<T>(factors), T(divisor), T(scale)};
        launch(task_vector_sum_kernel<C>, grid, kThreads, 0, stream, inputs_of(tensors), f,
               Cuts<C>::make(kept, tensors.size(), grid), output_of(out), out.n);
    }
};

}  // namespace

void task_vector_sum(const std::vector<View>& tensors, const std::vector<double>& weights,
                     const std::vector<double>& factors, const Kept& kept, double divisor, double scale, DType compute,
                     View out, Stream stream) {
    if (out.n > 0) run_computed<Launch>(compute, tensors, weights, factors, kept, divisor, scale, out, use(stream));
}

}  // namespace seme::cuda
