#include "histogram.cuh"
#include "variance.cuh"

namespace seme::cuda {
namespace {

template <class C>
__global__ void __launch_bounds__(kThreads)
    variance_histogram_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Window<C> window,
                              Count* counts, int64_t n) {
    BinCounter<C> counter(window, counts);
    for (Share share(n); share.count > 0; share.next(n)) {
        typename C::T v[kVector];
        variance_of<C>(in.count - 1, Deltas<C>(in, share.at, share.count), v);
        for (int j = 0; j < share.count; ++j) counter.add(C::key(v[j]));
    }
    counter.finish();
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, int64_t lowest, int shift, int64_t* counts, int device,
                    cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        launch(variance_histogram_kernel<C>, counting_grid(n, device), kThreads, 0, stream, inputs_of(tensors),
               Window<C>::make(lowest, shift), reinterpret_cast<Count*>(counts), n);
    }
};

}  // namespace

void variance_histogram(const std::vector<View>& tensors, int64_t lowest, int shift, DType compute, int64_t* counts,
                        Stream stream) {
    if (tensors[0].n > 0) run_computed<Launch>(compute, tensors, lowest, shift, counts, stream.device, use(stream));
}

}  // namespace seme::cuda
