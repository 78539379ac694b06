// Sums over a block of kBlock elements in float64, in an order that is part of the result: lane j of 64 adds
// elements j, j + 64, j + 128, ..., and then the lanes are folded in halves.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace seme::cpu {

constexpr int64_t kLanes = 64;

// n must be a multiple of kLanes, so the end of a block is padded with zeros, which change no sum. Vectors,
// because compilers would not keep an array of 64 sums in registers.
struct Lanes {
    typedef double Vector __attribute__((vector_size(64)));
    static constexpr int64_t kWidth = 8, kVectors = kLanes / kWidth;
    Vector sum[kVectors] = {};

    SEME_INLINE void add(const double* x, int64_t n) {
        Vector s[kVectors];
        for (int64_t k = 0; k < kVectors; ++k) s[k] = sum[k];
        for (int64_t j = 0; j < n; j += kLanes)
            for (int64_t k = 0; k < kVectors; ++k) s[k] += at(x + j, k);
        for (int64_t k = 0; k < kVectors; ++k) sum[k] = s[k];
    }

    SEME_INLINE void add_products(const double* x, const double* y, int64_t n) {
        Vector s[kVectors];
        for (int64_t k = 0; k < kVectors; ++k) s[k] = sum[k];
        for (int64_t j = 0; j < n; j += kLanes)
            for (int64_t k = 0; k < kVectors; ++k) s[k] += at(x + j, k) * at(y + j, k);
        for (int64_t k = 0; k < kVectors; ++k) sum[k] = s[k];
    }

    SEME_INLINE double fold() const {
        double lane[kLanes];
        __builtin_memcpy(lane, sum, sizeof(lane));
        for (int64_t half = kLanes / 2; half > 0; half /= 2)
            for (int64_t j = 0; j < half; ++j) lane[j] += lane[j + half];
        return lane[0];
    }

  private:
    static SEME_INLINE const Vector& at(const double* x, int64_t k) {
        typedef double Unaligned __attribute__((vector_size(64), aligned(8), may_alias));
        return reinterpret_cast<const Unaligned*>(x)[k];
    }
};

}  // namespace seme::cpu
