#include "../formulas.h"
#include "selection.cuh"

namespace seme::cuda {
namespace {

template <class C>
struct Factors {
    using T = typename C::T;
    PerTensor<T> weights, factors;
    T scale;
    bool normalize;
};

// The sign that wins is known only after all tensors have been read; so the sums of the terms that agree are kept for
// both signs (0: plus, 1: minus), and each tensor is read once.
template <class C>
__global__ void __launch_bounds__(kThreads)
    ties_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Factors<C> factors,
                const __grid_constant__ Cuts<C> cuts, Output out, int64_t n) {
    using T = typename C::T;
    using F = Ties<C>;
    const Share share(n);  // no early return: all threads of the block take part in sum_before
    T base[kVector], x[kVector], sum[kVector] = {}, num[2][kVector] = {}, den[2][kVector] = {};
    load_vector<C>(in[0], share.at, share.count, base);
    for (int i = 0; i < in.count - 1; ++i) {
        const T weight = factors.weights[i], factor = factors.factors[i];
        load_vector<C>(in[i + 1], share.at, share.count, x);
        for (int j = 0; j < kVector; ++j) x[j] = TaskVector<C>::delta(x[j], base[j]);
        keep(cuts, i, share.at, x);
        for (int j = 0; j < kVector; ++j) {
            const T term = TaskVector<C>::term(weight, x[j], factor);
            sum[j] += term;
            for (int s = 0; s < 2; ++s) {
                const T agrees = F::agrees(term, s == 0 ? T(1) : T(-1));
                num[s][j] += term * agrees;
                den[s][j] += weight * agrees;
            }
        }
    }
    for (int j = 0; j < kVector; ++j) {
        const bool plus = F::sign(sum[j]) > T(0);
        base[j] = F::finish(base[j], plus ? num[0][j] : num[1][j], plus ? den[0][j] : den[1][j], factors.normalize,
                            factors.scale);
    }
    store_vector(base, out, share.at, share.count);
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const std::vector<double>& weights,
                    const std::vector<double>& factors, const Kept& kept, bool normalize, double scale, View out,
                    cudaStream_t stream) {
        using T = typename C::T;
        const unsigned grid = ceil_div(out.n, kTile);
        const Factors<C> f{per_tensor<T>(weights), per_tensor<T>(factors), T(scale), normalize};
        launch(ties_kernel<C>, grid, kThreads, 0, stream, inputs_of(tensors), f,
               Cuts<C>::make(kept, tensors.size(), grid), output_of(out), out.n);
    }
};

}  // namespace

void ties(const std::vector<View>& tensors, const std::vector<double>& weights, const std::vector<double>& factors,
          const Kept& kept, bool normalize, double scale, DType compute, View out, Stream stream) {
    if (out.n > 0) run_computed<Launch>(compute, tensors, weights, factors, kept, normalize, scale, out, use(stream));
}

}  // namespace seme::cuda
