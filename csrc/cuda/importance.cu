#include "histogram.cuh"

namespace seme::cuda {
namespace {

// Importances of the elements of a share; 0 beyond. Keeps the base and the task vector.
template <class C>
struct Scores {
    using T = typename C::T;
    T base[kVector], delta[kVector], score[kVector];

    __device__ Scores(const Inputs& in, const double* factors, int64_t row, const Share& share) {
        load_vector<C>(in[0], share.at, share.count, base);
        load_vector<C>(in[1], share.at, share.count, delta);
        for (int j = 0; j < kVector; ++j) {
            delta[j] = TaskVector<C>::delta(delta[j], base[j]);
            const T factor = j < share.count ? C::round(T(factors[(share.at + j) / row])) : T(0);
            score[j] = Importance<C>::score(delta[j], factor);
        }
    }
};

// Block (x, i) counts its part in window i.
template <class C>
__global__ void __launch_bounds__(kThreads)
    importance_histogram_kernel(const __grid_constant__ Inputs in, const double* factors, int64_t row,
                                const __grid_constant__ PerTensor<Window<Importance<C>>> windows, Count* counts,
                                int64_t n) {
    BinCounter<Importance<C>> counter(windows[blockIdx.y], counts + blockIdx.y * (kBins + 2));
    for (Share share(n); share.count > 0; share.next(n)) {
        const Scores<C> scores(in, factors, row, share);
        for (int j = 0; j < share.count; ++j) counter.add(Importance<C>::key(scores.score[j]));
    }
    counter.finish();
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    importance_fusion_kernel(const __grid_constant__ Inputs in, const double* factors, int64_t row,
                             typename C::T threshold, Output out, int64_t n) {
    const Share share(n);
    if (share.count == 0) return;
    Scores<C> s(in, factors, row, share);
    for (int j = 0; j < kVector; ++j) s.base[j] = Importance<C>::finish(s.base[j], s.delta[j], s.score[j], threshold);
    store_vector(s.base, out, share.at, share.count);
}

template <class C>
struct LaunchHistogram {
    static void run(const std::vector<View>& tensors, const double* factors, int64_t row,
                    const std::vector<int64_t>& lowest, const std::vector<int>& shift, int64_t* counts, int device,
                    cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        PerTensor<Window<Importance<C>>> windows{};
        for (size_t i = 0; i < lowest.size(); ++i) windows.v[i] = Window<Importance<C>>::make(lowest[i], shift[i]);
        launch(importance_histogram_kernel<C>, dim3(counting_grid(n, device), unsigned(lowest.size())), kThreads, 0,
               stream, inputs_of(tensors), factors, row, windows, reinterpret_cast<Count*>(counts), n);
    }
};

template <class C>
struct LaunchFusion {
    static void run(const std::vector<View>& tensors, const double* factors, int64_t row, double threshold, View out,
                    cudaStream_t stream) {
        launch(importance_fusion_kernel<C>, ceil_div(out.n, kTile), kThreads, 0, stream, inputs_of(tensors), factors,
               row, typename C::T(threshold), output_of(out), out.n);
    }
};

}  // namespace

void importance_histogram(const std::vector<View>& tensors, const double* factors, int64_t row,
                          const std::vector<int64_t>& lowest, const std::vector<int>& shift, DType compute,
                          int64_t* counts, Stream stream) {
    if (tensors[0].n > 0 && !lowest.empty())
        run_computed<LaunchHistogram>(compute, tensors, factors, row, lowest, shift, counts, stream.device,
                                      use(stream));
}

void importance_fusion(const std::vector<View>& tensors, const double* factors, int64_t row, double threshold,
                       DType compute, View out, Stream stream) {
    if (out.n > 0) run_computed<LaunchFusion>(compute, tensors, factors, row, threshold, out, use(stream));
}

}  // namespace seme::cuda
