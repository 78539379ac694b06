#include "collect.h"

#include "../isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace seme::cpu {
namespace {

int64_t collect_each(const int32_t* x, int64_t n, int32_t* found) {
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j) {
        found[count] = x[j];
        count += x[j] >= 0;
    }
    return count;
}

#if defined(__x86_64__)
// For each set of 8 lanes, as the bits of its number: the lanes in it, in order, one a byte.
struct LaneLists {
    uint64_t of[256] = {};
    constexpr LaneLists() {
        for (int set = 0; set < 256; ++set)
            for (int lane = 7; lane >= 0; --lane)
                if (set >> lane & 1) of[set] = of[set] << 8 | uint64_t(lane);
    }
};
constexpr LaneLists kLaneLists;

// The same with a table, because AVX2 has no compress; no compiler makes one of the loop above. Writes 8 entries at a
// time.
__attribute__((target("arch=x86-64-v3"))) int64_t collect_avx2(const int32_t* x, int64_t n, int32_t* found) {
    int64_t count = 0, j = 0;
    for (; j + 8 <= n; j += 8) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + j));
        const unsigned set = ~unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(v))) & 0xFFu;
        const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(kLaneLists.of[set])));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + count), _mm256_permutevar8x32_epi32(v, lanes));
        count += _mm_popcnt_u32(set);
    }
    return count + collect_each(x + j, n - j, found + count);
}

// The same with a compress. Writes 16 entries at a time.
__attribute__((target("arch=x86-64-v4"))) int64_t collect_avx512(const int32_t* x, int64_t n, int32_t* found) {
    int64_t count = 0, j = 0;
    for (; j + 16 <= n; j += 16) {
        const __m512i v = _mm512_loadu_si512(x + j);
        const __mmask16 set = _mm512_cmpge_epi32_mask(v, _mm512_setzero_si512());
        _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(set, v));
        count += _mm_popcnt_u32(set);
    }
    return count + collect_each(x + j, n - j, found + count);
}
#endif

}  // namespace

int64_t collect(const int32_t* x, int64_t n, int32_t* found) {
#if defined(__x86_64__)
    if (isa() == Isa::Avx512) return collect_avx512(x, n, found);
    if (isa() == Isa::Avx2) return collect_avx2(x, n, found);
#endif
    return collect_each(x, n, found);
}

}  // namespace seme::cpu
