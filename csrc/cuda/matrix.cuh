// Tiles of matrix products: 256 threads compute 64 x 64 results of A B^T, from tiles of A and B in shared memory that
// are contiguous along the axis that is summed. A thread holds 16 of them, those that the tensor cores give it, in
// whatever arithmetic; so what comes after a product is written once.
#pragma once

#include "tile.cuh"

namespace seme::cuda {

constexpr int kSide = 64;  // rows and columns of a tile of results
constexpr int kProductThreads = 256;
constexpr int kResults = kSide * kSide / kProductThreads;

// A row-major matrix as a kernel sees it.
struct Matrix {
    Input data;
    int64_t rows, columns, pitch;  // pitch: elements from row to row
};

inline Matrix matrix_of(const View& v, int64_t rows, int64_t columns, int64_t pitch) {
    return {{v.data, v.dtype, is_aligned(v.data) && pitch % kVector == 0}, rows, columns, pitch};
}

inline Matrix matrix_of(const View& v, int64_t rows, int64_t columns) { return matrix_of(v, rows, columns, columns); }

// y = 8 entries of a row from `column` on; 0 outside of the matrix.
template <class C>
__device__ __forceinline__ void load_entries(const Matrix& m, int64_t row, int64_t column,
                                             typename C::T (&y)[kVector]) {
    const int64_t left = row < m.rows ? m.columns - column : 0;
    const int count = left <= 0 ? 0 : left < kVector ? int(left) : kVector;
    load_vector<C>(m.data, row * m.pitch + column, count, y);
}

template <class C>
__device__ __forceinline__ typename C::T load_entry(const Input& in, int64_t at) {
    typename C::T x = 0;
    switch (in.dtype) {
        case DType::F32: load(static_cast<const float*>(in.data) + at, x); break;
        case DType::F16: load(static_cast<const f16*>(in.data) + at, x); break;
        case DType::BF16: load(static_cast<const bf16*>(in.data) + at, x); break;
        case DType::F64: load(static_cast<const double*>(in.data) + at, x); break;
    }
    return x;
}

template <class T>
__device__ __forceinline__ void store_entry(const Output& out, int64_t at, T x) {
    switch (out.dtype) {
        case DType::F32: return store(static_cast<float*>(out.data) + at, x);
        case DType::F16: return store(static_cast<f16*>(out.data) + at, x);
        case DType::BF16: return store(static_cast<bf16*>(out.data) + at, x);
        case DType::F64: return store(static_cast<double*>(out.data) + at, x);
    }
}

// Which result of the tile a thread's `i`-th one is: the layout of mma.m16n8k16, warps in 4 rows and 2 columns.
__device__ __forceinline__ int result_row(int i) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    return warp % 4 * 16 + lane / 4 + i % 4 / 2 * 8;
}
__device__ __forceinline__ int result_column(int i) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    return warp / 4 * 32 + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

#ifndef SEME_MMA  // tests/kernels/cuda_emulator.h has its own
// c += a b^T for 16 x 8 results of a warp: a has 16 rows, b has 8, of 16 bfloat16 each; the sums are float32.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// An operand tile has kSide lines of kInner entries; a Word holds kPack of them. kPitch: words from line to line,
// such that the lines that a warp reads at once lie in different banks.

// bfloat16 on the tensor cores.
struct TensorCores {
    using C = ComputeF32;
    using Sum = float;
    using Word = uint32_t;
    static constexpr int kPack = 2, kInner = 32, kPitch = 20;

    static __device__ __forceinline__ Word pack(const float* x) {
        return to_bf16(x[0]).bits | Word(to_bf16(x[1]).bits) << 16;
    }

    // sums[m] += A_m B^T. tiles: A_0 .. A_{count - 1}, then B.
    template <int kMost>
    static __device__ __forceinline__ void multiply(const Word* tiles, int count, Sum (&sums)[kMost][kResults]) {
        const int lane = threadIdx.x % kWarp, line = result_row(0), word = lane % 4;
        const Word* b_tile = tiles + count * kSide * kPitch;
#pragma unroll
        for (int k = 0; k < kInner / kPack; k += 8) {  // 16 entries
            uint32_t b[4][2];
#pragma unroll
            for (int f = 0; f < 4; ++f) {
                const Word* p = b_tile + (threadIdx.x / kWarp / 4 * 32 + f * 8 + lane / 4) * kPitch + k + word;
                b[f][0] = p[0];
                b[f][1] = p[4];
            }
#pragma unroll
            for (int m = 0; m < kMost; ++m) {
                if (m >= count) break;
                const Word* p = tiles + (m * kSide + line) * kPitch + k + word;
                const uint32_t a[4] = {p[0], p[8 * kPitch], p[4], p[8 * kPitch + 4]};
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    float c[4];
                    for (int e = 0; e < 4; ++e) c[e] = sums[m][f * 4 + e];
                    mma(c, a, b[f]);
                    for (int e = 0; e < 4; ++e) sums[m][f * 4 + e] = c[e];
                }
            }
        }
    }
};

// float32 or float64, one operation after the other.
template <class C_, int kInner_>
struct Scalar {
    using C = C_;
    using Sum = typename C::T;
    using Word = Sum;
    static constexpr int kPack = 1, kInner = kInner_, kPitch = kInner + 1;

    static __device__ __forceinline__ Word pack(const Sum* x) { return x[0]; }

    template <int kMost>
    static __device__ __forceinline__ void multiply(const Word* tiles, int count, Sum (&sums)[kMost][kResults]) {
        const Word* b_tile = tiles + count * kSide * kPitch;
        for (int k = 0; k < kInner; ++k) {
            Sum b[8];  // the columns of results 0, 1, 4, 5, 8, ...
#pragma unroll
            for (int j = 0; j < 8; ++j) b[j] = b_tile[result_column(j / 2 * 4 + j % 2) * kPitch + k];
#pragma unroll
            for (int m = 0; m < kMost; ++m) {
                if (m >= count) break;
                const Word* p = tiles + (m * kSide + result_row(0)) * kPitch + k;
                const Sum a[2] = {p[0], p[8 * kPitch]};
#pragma unroll
                for (int i = 0; i < kResults; ++i) sums[m][i] += a[i % 4 / 2] * b[i / 4 * 2 + i % 2];
            }
        }
    }
};

using Float32 = Scalar<ComputeF32, 32>;
using Float64 = Scalar<ComputeF64, 16>;

template <class P>
constexpr int kTileWords = kSide * P::kPitch;

// 8 entries from `inner` on of one line of an operand tile.
template <class P>
__device__ __forceinline__ void put(typename P::Word* tile, int line, int inner, const typename P::Sum (&x)[kVector]) {
#pragma unroll
    for (int j = 0; j < kVector; j += P::kPack) tile[line * P::kPitch + (inner + j) / P::kPack] = P::pack(x + j);
}

// Calls f(line, inner) for the groups of 8 entries of a tile that this thread brings.
template <class P, class F>
__device__ __forceinline__ void for_groups(const F& f) {
    constexpr int kGroups = P::kInner / kVector;
    for (int i = threadIdx.x; i < kSide * kGroups; i += kProductThreads) f(i / kGroups, i % kGroups * kVector);
}

// Lines [line, line + kSide), entries [inner, inner + kInner) of m.
template <class P>
__device__ __forceinline__ void bring(const Matrix& m, int64_t line, int64_t inner, typename P::Word* tile) {
    for_groups<P>([&](int l, int i) {
        typename P::Sum x[kVector];
        load_entries<typename P::C>(m, line + l, inner + i, x);
        put<P>(tile, l, i, x);
    });
}

// The same of the transpose of m: its rows are summed over, so they are brought in packs.
template <class P>
__device__ __forceinline__ void bring_transposed(const Matrix& m, int64_t line, int64_t inner, typename P::Word* tile) {
    constexpr int kWords = P::kInner / P::kPack;
    for (int i = threadIdx.x; i < kWords * (kSide / kVector); i += kProductThreads) {
        const int word = i % kWords, l = i / kWords * kVector;
        typename P::Sum x[P::kPack][kVector];
        for (int p = 0; p < P::kPack; ++p) load_entries<typename P::C>(m, inner + word * P::kPack + p, line + l, x[p]);
        for (int j = 0; j < kVector; ++j) {
            typename P::Sum packed[P::kPack];
            for (int p = 0; p < P::kPack; ++p) packed[p] = x[p][j];
            tile[(l + j) * P::kPitch + word] = P::pack(packed);
        }
    }
}

// Lets a kernel have more shared memory than the 48 KiB that need no asking.
template <class K>
void allow_shared(K kernel, int bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Which arithmetic the products are done in. bfloat16 models go to the tensor cores; all others, and what a float64
// operand meets, to the scalar units.
inline bool is_double(const std::vector<View>& tensors) {
    for (const View& t : tensors)
        if (t.dtype == DType::F64) return true;
    return false;
}

inline bool is_bf16(const std::vector<View>& tensors) {
    for (const View& t : tensors)
        if (t.dtype != DType::BF16) return false;
    return true;
}

}  // namespace seme::cuda
