// How the CPU kernels see memory: tiles that fit the L1 cache, converted to the arithmetic type once on the
// way in and rounded once on the way out. So a kernel is written for one type and serves all dtypes.
#pragma once

#include <stdexcept>

#include "../isa.h"
#include "../numeric.h"

namespace seme::cpu {

constexpr int64_t kTile = 1024;  // elements; kBlock is a multiple of it
static_assert(kBlock % kTile == 0, "a block is whole tiles");

// Loops with a function of the element, so that what is done with it needs no pass of its own over the tile. A lambda
// that is passed in must be SEME_LAMBDA, for the reason that everything else is SEME_INLINE.
#define SEME_LAMBDA __attribute__((always_inline))

template <class C, class S, class F>
SEME_INLINE void load_typed(const S* p, int64_t n, F f) {
    for (int64_t j = 0; j < n; ++j) {
        typename C::T v;
        load(p + j, v);
        f(j, kExact<C, S> ? v : C::round(v));
    }
}

// f(j, x) for j in [0, n), x = element at + j of v, rounded to the compute dtype.
template <class C, class F>
SEME_INLINE void load_each(const View& v, int64_t at, int64_t n, F f) {
    switch (v.dtype) {
        case DType::F32: return load_typed<C>(static_cast<const float*>(v.data) + at, n, f);
        case DType::F16: return load_typed<C>(static_cast<const f16*>(v.data) + at, n, f);
        case DType::BF16: return load_typed<C>(static_cast<const bf16*>(v.data) + at, n, f);
        case DType::F64: return load_typed<C>(static_cast<const double*>(v.data) + at, n, f);
    }
}

// y[0..n) = elements [at, at + n) of v, rounded to the compute dtype.
template <class C>
SEME_INLINE void load_tile(const View& v, int64_t at, int64_t n, typename C::T* y) {
    load_each<C>(v, at, n, [=](int64_t j, typename C::T x) SEME_LAMBDA { y[j] = x; });
}

template <class S, class F>
SEME_INLINE void store_typed(S* p, int64_t n, F f) {
    for (int64_t j = 0; j < n; ++j) store(p + j, f(j));
}

// Element at + j of v = f(j) for j in [0, n), rounded to nearest even.
template <class F>
SEME_INLINE void store_each(const View& v, int64_t at, int64_t n, F f) {
    switch (v.dtype) {
        case DType::F32: return store_typed(static_cast<float*>(v.data) + at, n, f);
        case DType::F16: return store_typed(static_cast<f16*>(v.data) + at, n, f);
        case DType::BF16: return store_typed(static_cast<bf16*>(v.data) + at, n, f);
        case DType::F64: return store_typed(static_cast<double*>(v.data) + at, n, f);
    }
}

// Elements [at, at + n) of v = x[0..n), rounded to nearest even.
template <class T>
SEME_INLINE void store_tile(const T* x, int64_t n, const View& v, int64_t at) {
    store_each(v, at, n, [=](int64_t j) SEME_LAMBDA { return x[j]; });
}

// Calls Body<C> for the compute dtype, in the best instruction set.
template <template <class> class Body, class... A>
void run_computed(DType compute, A... args) {
    switch (compute) {
        case DType::F32: return run_best<Body<ComputeF32>, A...>(args...);
        case DType::F16: return run_best<Body<ComputeF16>, A...>(args...);
        case DType::BF16: return run_best<Body<ComputeBF16>, A...>(args...);
        case DType::F64: return run_best<Body<ComputeF64>, A...>(args...);
    }
    throw std::invalid_argument("unknown compute dtype");
}

}  // namespace seme::cpu
