// exp and log of float64 without branches, so that compilers vectorise loops over them; a few units in the last place.
// For results that are held to a bound, not to the bit.
#pragma once

#include "../isa.h"
#include "../numeric.h"

namespace seme::cpu {

// A polynomial from its highest coefficient on; no loop, which would keep the loop around it from being vectorised.
SEME_INLINE double horner(double, double sum) { return sum; }
template <class... Terms>
SEME_INLINE double horner(double x, double sum, double term, Terms... rest) {
    return horner(x, sum * x + term, rest...);
}

// e^x for x <= 0, not less than e^-700. 2^k times the Taylor series of the rest, |r| <= ln(2) / 2.
SEME_INLINE double exp_negative(double x) {
    constexpr double kShift = 0x1.8p52;  // adding it rounds to an integer, which are then its lowest bits
    x = keep_if(!(x < -700.0), x) + keep_if(x < -700.0, -700.0);
    const double shifted = x * 0x1.71547652b82fep0 + kShift, k = shifted - kShift;
    const double r = (x - k * 0x1.62e42fefa38p-1) - k * 0x1.ef35793c7673p-45;
    const double series =
        horner(r, 1.0 / 87178291200.0, 1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
               1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5);
    return (1.0 + (r + r * r * series)) * bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023) << 52);
}

// ln(a / b) for normal numbers a, b > 0: k ln 2 + 2 artanh(s), s = (a - c) / (a + c) with c = 2^k b. The difference of
// their bits is about 2^52 log2(a / b), so the nearest k leaves a / c between 2/3 and 3/2.
SEME_INLINE double log_ratio(double a, double b) {
    constexpr uint64_t kOne = 0x3FF0000000000000, kHalfPlace = uint64_t(1) << 51, kExponent = 0x7FF0000000000000;
    const uint64_t u = bit_cast<uint64_t>(a) - bit_cast<uint64_t>(b) + (kOne + kHalfPlace);
    const double k = bit_cast<double>((u >> 52) | 0x4330000000000000) - (0x1p52 + 1023.0);
    const double c = b * bit_cast<double>(u & kExponent);
    const double s = (a - c) / (a + c), z = s * s;
    const double series = horner(z, 1.0 / 23.0, 1.0 / 21.0, 1.0 / 19.0, 1.0 / 17.0, 1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0,
                                 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0);
    return k * 0x1.62e42fefa38p-1 + (2.0 * (s + s * z * series) + k * 0x1.ef35793c7673p-45);
}

// ln y for a normal number y > 0, 0, infinity and NaN.
SEME_INLINE double log_positive(double y) {
    const double infinity = bit_cast<double>(uint64_t(0x7FF0000000000000));
    const double edges = keep_if(y == 0.0, -infinity) + keep_if(y == infinity, infinity);
    const bool normal = (y > 0.0) & (y < infinity);
    return (keep_if(normal, log_ratio(y, 1.0)) + edges) + keep_if(!(y == y), y);
}

}  // namespace seme::cpu
