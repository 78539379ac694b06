// bf16 and fp16 <-> fp32, and rounding to the compute dtype. Host and device, no intrinsics: the
// same bits everywhere. Conversions round to nearest even; a NaN becomes the quiet NaN 0x7FC0 / 0x7E00.
#pragma once

#include <cstdint>
#include <cstring>

#include "seme.h"

#if defined(__CUDACC__)
#define SEME_HD __host__ __device__ __forceinline__
#else
#define SEME_HD inline __attribute__((always_inline))
#endif

namespace seme {

template <class To, class From>
SEME_HD To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To y;
    memcpy(&y, &x, sizeof(To));
    return y;
}

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

SEME_HD float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

SEME_HD bf16 to_bf16(float x) {
    uint32_t u = bit_cast<uint32_t>(x);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    return {uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

// fp16 has 5 exponent bits and 10 mantissa bits. Shifting them into an fp32's places leaves the
// exponent off by 127 - 15 = 112, which one exact multiplication by 2^112 repairs, subnormals included.
SEME_HD float to_float(f16 x) {
    uint32_t magnitude = uint32_t(x.bits & 0x7FFFu) << 13;
    float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(127 + 112) << 23);
    uint32_t u = bit_cast<uint32_t>(scaled);
    u = magnitude >= (0x7C00u << 13) ? (u | 0x7F800000u) : u;  // inf and NaN
    return bit_cast<float>(u | (uint32_t(x.bits & 0x8000u) << 16));
}

SEME_HD f16 to_f16(float x) {
    uint32_t u = bit_cast<uint32_t>(x);
    uint32_t sign = (u >> 16) & 0x8000u;
    uint32_t a = u & 0x7FFFFFFFu;
    // Normal result: drop 13 mantissa bits with round to nearest even, and re-bias the exponent.
    uint32_t normal = (a - (112u << 23) + 0xFFFu + ((a >> 13) & 1u)) >> 13;
    // Below 2^-14 the grid is 2^-24: adding 0.5 makes the fp32 adder round on exactly that grid.
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3F000000u;
    uint32_t r = a < (113u << 23) ? subnormal : normal;
    r = a >= 0x477FF000u ? 0x7C00u : r;  // 65520 and beyond round to infinity
    r = a > 0x7F800000u ? 0x7E00u : r;
    return {uint16_t(r | sign)};
}

SEME_HD float to_float(float x) { return x; }

// How a value of the compute dtype is held (T) and how a result is rounded to it.
struct ComputeF32 {
    using T = float;
    static SEME_HD float round(float x) { return x; }
};
struct ComputeBF16 {
    using T = float;
    static SEME_HD float round(float x) { return to_float(to_bf16(x)); }
};
struct ComputeF16 {
    using T = float;
    static SEME_HD float round(float x) { return to_float(to_f16(x)); }
};
struct ComputeF64 {
    using T = double;
    static SEME_HD double round(double x) { return x; }
};

// Between memory and arithmetic type. A double becomes bf16 or fp16 by way of float, as in torch.
SEME_HD void load(const float* p, float& y) { y = *p; }
SEME_HD void load(const bf16* p, float& y) { y = to_float(*p); }
SEME_HD void load(const f16* p, float& y) { y = to_float(*p); }
SEME_HD void load(const double* p, float& y) { y = float(*p); }
SEME_HD void load(const float* p, double& y) { y = double(*p); }
SEME_HD void load(const bf16* p, double& y) { y = double(to_float(*p)); }
SEME_HD void load(const f16* p, double& y) { y = double(to_float(*p)); }
SEME_HD void load(const double* p, double& y) { y = *p; }

SEME_HD void store(float* p, float x) { *p = x; }
SEME_HD void store(bf16* p, float x) { *p = to_bf16(x); }
SEME_HD void store(f16* p, float x) { *p = to_f16(x); }
SEME_HD void store(double* p, float x) { *p = double(x); }
SEME_HD void store(float* p, double x) { *p = float(x); }
SEME_HD void store(bf16* p, double x) { *p = to_bf16(float(x)); }
SEME_HD void store(f16* p, double x) { *p = to_f16(float(x)); }
SEME_HD void store(double* p, double x) { *p = x; }

}  // namespace seme
