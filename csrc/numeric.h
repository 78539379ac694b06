// bf16 and fp16 <-> fp32, and rounding to the compute dtype. Host and device, no intrinsics: the
// same bits everywhere. Conversions round to nearest even; a NaN becomes the quiet NaN 0x7FC0 / 0x7E00.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// x if `keep`, else 0: by its bits, because compilers make a branch of `keep ? x : 0` and then do not vectorise.
template <class T>
SEME_HD T keep_if(bool keep, T x) {
    using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    return bit_cast<T>(bit_cast<Bits>(x) & -Bits(keep));
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

// The power of two that rounds a magnitude of exponent E to fp16 when it is added in fp32: 2^(E + 13), whose
// sum has the fp16 grid 2^(E - 10) as its last place. Below 2^-14 the grid stays 2^-24; from 2^16 on all is
// infinity anyway. Written without branches, which compilers would not vectorise.
SEME_HD uint32_t f16_grid(uint32_t magnitude) {
    uint32_t exponent = magnitude & 0x7F800000u;
    exponent = exponent > (113u << 23) ? exponent : (113u << 23);
    exponent = exponent < (143u << 23) ? exponent : (143u << 23);
    return exponent + (13u << 23);
}

SEME_HD f16 to_f16(float x) {
    uint32_t u = bit_cast<uint32_t>(x);
    uint32_t a = u & 0x7FFFFFFFu;
    uint32_t nan = a > 0x7F800000u ? 0x0200u : 0u;
    a = a < 0x47800000u ? a : 0x47800000u;  // 2^16: its bits are those of infinity
    uint32_t grid = f16_grid(a);
    uint32_t steps = bit_cast<uint32_t>(bit_cast<float>(a) + bit_cast<float>(grid)) - grid;
    uint32_t r = ((grid >> 13) - (126u << 10)) + steps;
    return {uint16_t(r | nan | ((u >> 16) & 0x8000u))};
}

SEME_HD float to_float(float x) { return x; }

// How a value of the compute dtype is held (T), how a result is rounded to it, and the key of a rounded result:
// the bits of its magnitude as an integer, which grows with the magnitude. NaN has one key, the greatest.
struct ComputeF32 {
    using T = float;
    using Key = int32_t;
    static constexpr Key kGreatestKey = 0x7FC00000;
    static SEME_HD float round(float x) { return x; }
    static SEME_HD Key key(float x) {
        Key k = bit_cast<Key>(x) & 0x7FFFFFFF;
        return k < kGreatestKey ? k : kGreatestKey;
    }
};
struct ComputeBF16 {
    using T = float;
    using Key = int32_t;
    static constexpr Key kGreatestKey = 0x7FC0;
    static SEME_HD float round(float x) { return to_float(to_bf16(x)); }
    static SEME_HD Key key(float x) { return Key((bit_cast<uint32_t>(x) >> 16) & 0x7FFFu); }
};
struct ComputeF16 {
    using T = float;
    using Key = int32_t;
    static constexpr Key kGreatestKey = 0x7E00;
    static SEME_HD float round(float x) {
        uint32_t u = bit_cast<uint32_t>(x);
        float grid = bit_cast<float>(f16_grid(u & 0x7FFFFFFFu));
        float r = (bit_cast<float>(u & 0x7FFFFFFFu) + grid) - grid;
        // From 2^16 on it becomes infinity, without a branch: by way of 2^128. Exact for all else.
        r = r * bit_cast<float>(uint32_t(127 + 112) << 23) * bit_cast<float>(uint32_t(127 - 112) << 23);
        return bit_cast<float>(bit_cast<uint32_t>(r) | (u & 0x80000000u));
    }
    static SEME_HD Key key(float x) { return Key(to_f16(x).bits & 0x7FFFu); }
};
struct ComputeF64 {
    using T = double;
    using Key = int64_t;
    static constexpr Key kGreatestKey = 0x7FF8000000000000;
    static SEME_HD double round(double x) { return x; }
    static SEME_HD Key key(double x) {
        Key k = bit_cast<Key>(x) & 0x7FFFFFFFFFFFFFFF;
        return k < kGreatestKey ? k : kGreatestKey;
    }
};

// True if every value of the storage type S is one of the compute dtype C, so that a load need not round.
template <class C, class S>
constexpr bool kExact = (std::is_same_v<C, ComputeBF16> && std::is_same_v<S, bf16>) ||
                        (std::is_same_v<C, ComputeF16> && std::is_same_v<S, f16>);

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
