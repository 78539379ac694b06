// Task vectors that a kernel reads more than once: their number has no bound that registers could hold.
#pragma once

#include "../formulas.h"
#include "tile.cuh"

namespace seme::cuda {

// Elements [at, at + count) of the task vectors; 0 beyond. Keeps the base.
template <class C>
struct Deltas {
    using T = typename C::T;
    const Inputs& in;
    int64_t at;
    int count;
    T base[kVector];

    __device__ Deltas(const Inputs& in, int64_t at, int count) : in(in), at(at), count(count) {
        load_vector<C>(in[0], at, count, base);
    }
    __device__ void operator()(int i, T (&d)[kVector]) const {
        load_vector<C>(in[i + 1], at, count, d);
        for (int j = 0; j < kVector; ++j) d[j] = TaskVector<C>::delta(d[j], base[j]);
    }
};

}  // namespace seme::cuda
