// What selection (nearest.cpp) and least squares (erase.cpp) of the op `resolve` share.
#pragma once

#include "tile.h"

namespace seme::cpu {

constexpr int64_t kMost = 64;  // greatest k

// A label and its score; the better one comes first in a sorted list.
template <class C>
struct Candidate {
    typename C::T value;
    typename C::Key magnitude;
    int64_t number;

    static SEME_INLINE Candidate of(typename C::T score, int64_t label) { return {score, C::key(score), label}; }
    SEME_INLINE typename C::T score() const { return value; }
    SEME_INLINE typename C::Key key() const { return magnitude; }
    SEME_INLINE int64_t label() const { return number; }
    SEME_INLINE bool operator<(const Candidate& other) const {
        return magnitude != other.magnitude ? magnitude > other.magnitude : number < other.number;
    }
};

// In one integer, which is quicker to compare: 31 bits of key, 32 of the label from the top down, the sign.
template <>
struct Candidate<ComputeF32> {
    uint64_t bits;

    static SEME_INLINE Candidate of(float score, int64_t label) {
        const uint64_t key = uint64_t(ComputeF32::key(score)), sign = bit_cast<uint32_t>(score) >> 31;
        return {key << 33 | uint64_t(uint32_t(~label)) << 1 | sign};
    }
    SEME_INLINE float score() const { return bit_cast<float>(uint32_t(bits >> 33) | uint32_t(bits) << 31); }
    SEME_INLINE int32_t key() const { return int32_t(bits >> 33); }
    SEME_INLINE int64_t label() const { return int64_t(uint32_t(~(bits >> 1))); }
    SEME_INLINE bool operator<(const Candidate& other) const { return bits > other.bits; }
};

// Vectors of 32 bytes; GCC takes wider ones apart badly where there is no AVX-512.
template <class T>
struct Wide {
    typedef T Vector __attribute__((vector_size(32)));
    typedef T Memory __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
    static constexpr int64_t kLanes = 32 / sizeof(T);

    static SEME_INLINE const Memory& load(const T* x) { return *reinterpret_cast<const Memory*>(x); }
    static SEME_INLINE double fold(const Vector& v) {
        double sum = 0;
        for (int64_t l = 0; l < kLanes; ++l) sum += double(v[l]);
        return sum;
    }
};

}  // namespace seme::cpu
