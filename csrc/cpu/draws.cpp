#include "draws.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace seme::cpu {
namespace {

#if defined(__x86_64__)
// Each word in the lower half of 64 bits, as the instruction that multiplies takes it: compilers do not see that the
// upper halves do not matter. Four vectors at once hide its latency.
__attribute__((target("arch=x86-64-v3"))) void fill_avx2(uint64_t key, uint64_t block, int64_t blocks, int32_t* u) {
    constexpr int kVectors = kBlocksAtOnce / 4;
    const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
    const __m256i lower = _mm256_set1_epi64x(0xFFFFFFFF), four = _mm256_setr_epi64x(0, 1, 2, 3);
    for (int64_t i = 0; i < blocks; i += kBlocksAtOnce) {
        __m256i a[kVectors], b[kVectors], c[kVectors], d[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            a[v] = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(block) + i + 4 * v), four);
            b[v] = _mm256_srli_epi64(a[v], 32);
            c[v] = d[v] = _mm256_setzero_si256();
        }
        uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
        for (int round = 0; round < 10; ++round) {
            const __m256i s0 = _mm256_set1_epi64x(k0), s1 = _mm256_set1_epi64x(k1);
            for (int v = 0; v < kVectors; ++v) {
                const __m256i p = _mm256_mul_epu32(a[v], m0), q = _mm256_mul_epu32(c[v], m1);
                a[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(q, 32), b[v]), s0);
                c[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p, 32), d[v]), s1);
                b[v] = q;
                d[v] = p;
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        __m256i* to = reinterpret_cast<__m256i*>(u + i * kPerBlock);
        for (int v = 0; v < kVectors; ++v, to += 4) {
            const __m256i ab = _mm256_or_si256(_mm256_and_si256(a[v], lower), _mm256_slli_epi64(b[v], 32));
            const __m256i cd = _mm256_or_si256(_mm256_and_si256(c[v], lower), _mm256_slli_epi64(d[v], 32));
            const __m256i even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
            _mm256_storeu_si256(to, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(even)));
            _mm256_storeu_si256(to + 1, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(odd)));
            _mm256_storeu_si256(to + 2, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(even, 1)));
            _mm256_storeu_si256(to + 3, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(odd, 1)));
        }
    }
}
#endif

void fill(uint64_t key, uint64_t block, int64_t blocks, int32_t* u) {
#if defined(__x86_64__)
    if (isa() >= Isa::Avx2) return fill_avx2(key, block, blocks, u);
#endif
    for (int64_t i = 0; i < blocks; ++i) {
        const Philox words = Philox::at(key, block + uint64_t(i), 0);
        for (int j = 0; j < kPerBlock; ++j) u[i * kPerBlock + j] = words.half(j);
    }
}

}  // namespace

const int32_t* upper_halves(uint64_t key, int64_t e, int64_t n, int32_t (&memory)[kDraws]) {
    const int64_t skip = e % kPerBlock;
    fill(key, uint64_t(e / kPerBlock), (skip + n + kPerBlock - 1) / kPerBlock, memory);
    return memory + skip;
}

}  // namespace seme::cpu
