// How the CUDA kernels see memory. Each thread takes 8 consecutive elements, in accesses of 16 bytes where the
// address allows, converted to the arithmetic type once on the way in and rounded once on the way out. So a kernel is
// written for one type and serves all dtypes; the branch on the dtype is the same for all threads.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../numeric.h"
#include "cuda.h"

namespace seme::cuda {

constexpr int kVector = 8;  // elements per thread
constexpr int kThreads = int(kTile) / kVector;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

inline void check(cudaError_t e) {
    if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(e));
}

// Makes the stream's device current and gives the stream as CUDA knows it.
inline cudaStream_t use(Stream s) {
    check(cudaSetDevice(s.device));
    return reinterpret_cast<cudaStream_t>(s.handle);
}

// Starts `kernel`; the types of its parameters are its own, so that what is passed is converted as in a plain call.
template <class... P>
void launch(void (*kernel)(P...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const std::common_type_t<P>&... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, args...));
}

#ifndef SEME_DYNAMIC_SHARED  // tests/kernels/cuda_emulator.h has its own
#define SEME_DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#endif

inline unsigned ceil_div(int64_t n, int64_t per) { return unsigned((n + per - 1) / per); }

// One tensor as a kernel sees it.
struct Input {
    const void* data;
    DType dtype;
    bool aligned;  // to 16 bytes
};

struct Output {
    void* data;
    DType dtype;
    bool aligned;
};

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// What goes with each tensor, as a kernel argument.
template <class V>
struct PerTensor {
    V v[kMaxTensors];
    __device__ const V& operator[](int i) const { return v[i]; }
};

struct Inputs : PerTensor<Input> {
    int count;
};

inline Inputs inputs_of(const std::vector<View>& tensors) {
    Inputs in{};
    in.count = int(tensors.size());
    for (int i = 0; i < in.count; ++i) in.v[i] = {tensors[i].data, tensors[i].dtype, is_aligned(tensors[i].data)};
    return in;
}

inline Output output_of(const View& v) { return {v.data, v.dtype, is_aligned(v.data)}; }

template <class V, class From>
PerTensor<V> per_tensor(const std::vector<From>& values) {
    PerTensor<V> p{};
    for (size_t i = 0; i < values.size(); ++i) p.v[i] = V(values[i]);
    return p;
}

// s[0..kVector) = p[0..count), the rest zero.
template <class S>
__device__ __forceinline__ void load_raw(const S* p, int count, bool aligned, S (&s)[kVector]) {
    if (aligned && count == kVector) {
        constexpr int kWords = kVector * sizeof(S) / sizeof(uint4);
        uint4 words[kWords];
#pragma unroll
        for (int k = 0; k < kWords; ++k) words[k] = reinterpret_cast<const uint4*>(p)[k];
        memcpy(s, words, sizeof(s));
    } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) s[j] = j < count ? p[j] : S{};
    }
}

template <class C, class S>
__device__ __forceinline__ void load_typed(const S* p, int count, bool aligned, typename C::T (&y)[kVector]) {
    S s[kVector];
    load_raw(p, count, aligned, s);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
        typename C::T v;
        load(s + j, v);
        y[j] = kExact<C, S> ? v : C::round(v);
    }
}

// y[0..kVector) = elements [at, at + count), rounded to the compute dtype; 0 beyond.
template <class C>
__device__ __forceinline__ void load_vector(const Input& in, int64_t at, int count, typename C::T (&y)[kVector]) {
    switch (in.dtype) {
        case DType::F32: return load_typed<C>(static_cast<const float*>(in.data) + at, count, in.aligned, y);
        case DType::F16: return load_typed<C>(static_cast<const f16*>(in.data) + at, count, in.aligned, y);
        case DType::BF16: return load_typed<C>(static_cast<const bf16*>(in.data) + at, count, in.aligned, y);
        case DType::F64: return load_typed<C>(static_cast<const double*>(in.data) + at, count, in.aligned, y);
    }
}

template <class T, class S>
__device__ __forceinline__ void store_typed(const T (&x)[kVector], int count, bool aligned, S* p) {
    S s[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) store(s + j, x[j]);
    if (aligned && count == kVector) {
        constexpr int kWords = kVector * sizeof(S) / sizeof(uint4);
        uint4 words[kWords];
        memcpy(words, s, sizeof(s));
#pragma unroll
        for (int k = 0; k < kWords; ++k) reinterpret_cast<uint4*>(p)[k] = words[k];
    } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (j < count) p[j] = s[j];
    }
}

// Elements [at, at + count) = x[0..count), rounded to nearest even.
template <class T>
__device__ __forceinline__ void store_vector(const T (&x)[kVector], const Output& out, int64_t at, int count) {
    switch (out.dtype) {
        case DType::F32: return store_typed(x, count, out.aligned, static_cast<float*>(out.data) + at);
        case DType::F16: return store_typed(x, count, out.aligned, static_cast<f16*>(out.data) + at);
        case DType::BF16: return store_typed(x, count, out.aligned, static_cast<bf16*>(out.data) + at);
        case DType::F64: return store_typed(x, count, out.aligned, static_cast<double*>(out.data) + at);
    }
}

// This thread's share of a grid of kThreads threads per block: elements [at, at + count) of n; count may be 0.
struct Share {
    int64_t at;
    int count;
    __device__ explicit Share(int64_t n) : at((int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector) {
        set_count(n);
    }
    // The next share of a thread where the grid is smaller than the tensor.
    __device__ void next(int64_t n) {
        at += int64_t(gridDim.x) * kThreads * kVector;
        set_count(n);
    }

  private:
    __device__ void set_count(int64_t n) { count = at >= n ? 0 : n - at < kVector ? int(n - at) : kVector; }
};

// The sum of `mine` over the threads of the block before this one. Every thread of the block has to call it.
__device__ __forceinline__ int sum_before(int mine) {
    __shared__ int totals[kThreads / kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int sum = mine;
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
        int other = __shfl_up_sync(kAllLanes, sum, d);
        if (lane >= d) sum += other;
    }
    __syncthreads();  // totals of an earlier call have been read
    if (lane == kWarp - 1) totals[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += totals[w];
    return sum - mine;
}

// The reductions give each block of kBlock elements to a team of 8 threads. Its 64 lanes of summation are 8 per thread:
// thread t adds elements 8t .. 8t + 7 of every row of 64, in order. 2 rows are loaded at once.
constexpr int kRow = 64;
constexpr int kRows = 2;
constexpr int kTeam = kRow / kVector;

// The team that this thread is in. Teams beyond the last block repeat it, so that warps stay whole, and store nothing.
struct Team {
    int64_t block;
    int thread;
    bool first;  // this thread stores the results of the block
    __device__ explicit Team(int64_t blocks) {
        const int64_t own = int64_t(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
        block = own < blocks ? own : blocks - 1;
        thread = threadIdx.x % kTeam;
        first = own < blocks && thread == 0;
    }
};

template <class C, class S>
__device__ __forceinline__ void load_rows_typed(const S* p, int64_t left, bool aligned,
                                                typename C::T (&y)[kRows][kVector]) {
    constexpr int kWords = kVector * sizeof(S) / sizeof(uint4);
    S s[kRows][kVector];
    if (aligned && left >= (kRows - 1) * kRow + kVector) {
        uint4 words[kRows][kWords];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            for (int k = 0; k < kWords; ++k) words[r][k] = reinterpret_cast<const uint4*>(p + r * kRow)[k];
        memcpy(s, words, sizeof(s));
    } else {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            for (int k = 0; k < kVector; ++k) s[r][k] = r * kRow + k < left ? p[r * kRow + k] : S{};
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
        for (int k = 0; k < kVector; ++k) {
            typename C::T v;
            load(&s[r][k], v);
            y[r][k] = kExact<C, S> ? v : C::round(v);
        }
}

// y[r][k] = element at + 64 r + k, rounded to the compute dtype; 0 where `left` elements do not reach.
template <class C>
__device__ __forceinline__ void load_rows(const Input& in, int64_t at, int64_t left,
                                          typename C::T (&y)[kRows][kVector]) {
    switch (in.dtype) {
        case DType::F32: return load_rows_typed<C>(static_cast<const float*>(in.data) + at, left, in.aligned, y);
        case DType::F16: return load_rows_typed<C>(static_cast<const f16*>(in.data) + at, left, in.aligned, y);
        case DType::BF16: return load_rows_typed<C>(static_cast<const bf16*>(in.data) + at, left, in.aligned, y);
        case DType::F64: return load_rows_typed<C>(static_cast<const double*>(in.data) + at, left, in.aligned, y);
    }
}

// The sum of the team's 64 lanes by halving: lane j takes lane j + 32, then j + 16, ... j + 1. Valid in its thread 0.
__device__ __forceinline__ double fold_lanes(double (&lanes)[kVector]) {
#pragma unroll
    for (int d = kTeam / 2; d > 0; d /= 2)
        for (int k = 0; k < kVector; ++k) lanes[k] += __shfl_down_sync(kAllLanes, lanes[k], d);
#pragma unroll
    for (int d = kVector / 2; d > 0; d /= 2)
        for (int k = 0; k < d; ++k) lanes[k] += lanes[k + d];
    return lanes[0];
}

// Calls Launch<C>::run for the compute dtype.
template <template <class> class Launch, class... A>
void run_computed(DType compute, const A&... args) {
    switch (compute) {
        case DType::F32: return Launch<ComputeF32>::run(args...);
        case DType::F16: return Launch<ComputeF16>::run(args...);
        case DType::BF16: return Launch<ComputeBF16>::run(args...);
        case DType::F64: return Launch<ComputeF64>::run(args...);
    }
    throw std::invalid_argument("unknown compute dtype");
}

}  // namespace seme::cuda
