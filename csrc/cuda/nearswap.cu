#include "../formulas.h"
#include "tile.cuh"

namespace seme::cuda {
namespace {

template <class C>
__global__ void __launch_bounds__(kThreads)
    nearswap_kernel(const __grid_constant__ Inputs in, typename C::T t, typename C::T least, Output out, int64_t n) {
    using F = NearSwap<C>;
    const Share share(n);
    if (share.count == 0) return;
    typename C::T a[kVector], b[kVector];
    load_vector<C>(in[0], share.at, share.count, a);
    load_vector<C>(in[1], share.at, share.count, b);
    for (int j = 0; j < kVector; ++j) {
        const typename C::T distance = F::at_least(F::distance(a[j], b[j]), least);
        a[j] = F::mix(a[j], b[j], F::clamp(F::share(distance, t)));
    }
    store_vector(a, out, share.at, share.count);
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, double t, double least, View out, cudaStream_t stream) {
        using T = typename C::T;
        launch(nearswap_kernel<C>, ceil_div(out.n, kTile), kThreads, 0, stream, inputs_of(tensors), T(t), T(least),
               output_of(out), out.n);
    }
};

}  // namespace

void nearswap(const std::vector<View>& tensors, double t, double least, DType compute, View out, Stream stream) {
    if (out.n > 0) run_computed<Launch>(compute, tensors, t, least, out, use(stream));
}

}  // namespace seme::cuda
