// The variance over the task vectors, which the CUDA kernels of SCE select by.
#pragma once

#include "deltas.cuh"
#include "selection.cuh"

namespace seme::cuda {

// v[0..N) = the variance over `count` task vectors. delta(i, d) gives N elements of task vector i.
template <class C, int N, class F>
__device__ __forceinline__ void variance_of(int count, const F& delta, typename C::T (&v)[N]) {
    using V = Variance<C>;
    typename C::T first[N], d[N];
    double sum[N] = {}, squares[N] = {};
    delta(0, first);
    for (int i = 1; i < count; ++i) {
        delta(i, d);
        for (int j = 0; j < N; ++j) {
            const double e = V::deviation(d[j], first[j]);
            sum[j] += e;
            squares[j] += e * e;
        }
    }
    for (int j = 0; j < N; ++j) v[j] = V::finish(sum[j], squares[j], double(count));
}

}  // namespace seme::cuda
