// Sums over a block of kBlock elements in float64, in an order that is part of the result: lane j of 64 adds
// elements j, j + 64, j + 128, ..., and then the lanes are folded in halves.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace seme::cpu {

constexpr int64_t kLanes = 64;

// n must be a multiple of kLanes, so the end of a block is padded with zeros, which change no sum. Written in
// vectors, because compilers would not keep an array of sums in registers, and half of the lanes at a time,
// because AVX2 has registers for no more. (GCC takes 64-byte vectors apart badly where there is no AVX-512.)
struct Lanes {
    typedef double Vector __attribute__((vector_size(32)));
    typedef double Memory __attribute__((vector_size(32), aligned(8), may_alias));  // at any address
    static constexpr int64_t kHalf = kLanes / 2, kVectors = kHalf / 4;
    double sum[kLanes] = {};

    SEME_INLINE void add(const double* x, int64_t n) {
        for (int64_t half = 0; half < kLanes; half += kHalf) {
            Vector s[kVectors];
            load(half, s);
            for (int64_t j = half; j < n; j += kLanes) {
                const Memory* a = reinterpret_cast<const Memory*>(x + j);
                for (int64_t k = 0; k < kVectors; ++k) s[k] += a[k];
            }
            store(half, s);
        }
    }

    SEME_INLINE void add_products(const double* x, const double* y, int64_t n) {
        for (int64_t half = 0; half < kLanes; half += kHalf) {
            Vector s[kVectors];
            load(half, s);
            for (int64_t j = half; j < n; j += kLanes) {
                const Memory* a = reinterpret_cast<const Memory*>(x + j);
                const Memory* b = reinterpret_cast<const Memory*>(y + j);
                for (int64_t k = 0; k < kVectors; ++k) s[k] += a[k] * b[k];
            }
            store(half, s);
        }
    }

    SEME_INLINE double fold() {
        for (int64_t half = kLanes / 2; half > 0; half /= 2)
            for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
        return sum[0];
    }

  private:
    SEME_INLINE void load(int64_t half, Vector* s) const {
        for (int64_t k = 0; k < kVectors; ++k) s[k] = reinterpret_cast<const Memory*>(sum + half)[k];
    }
    SEME_INLINE void store(int64_t half, const Vector* s) {
        for (int64_t k = 0; k < kVectors; ++k) reinterpret_cast<Memory*>(sum + half)[k] = s[k];
    }
};

}  // namespace seme::cpu
