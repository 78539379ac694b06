// Counting keys in the bins of a window, which the histograms of magnitudes and of what is made of them share.
#pragma once

#include <mutex>

#include "../formulas.h"
#include "../parallel.h"
#include "tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace seme::cpu {
namespace {

constexpr int64_t kColumns = kBins + 2;  // the bins, keys beyond the window, keys that are not the first of their bin
constexpr int64_t kLeastBlocks = 32;     // per thread; for fewer, a histogram of its own costs more than it saves

// hit = the entries of bin[0..n) that are not negative, in order; returns how many. No branch depends on them.
int64_t collect(const int32_t* bin, int64_t n, int32_t* hit) {
    int64_t hits = 0;
    for (int64_t j = 0; j < n; ++j) {
        hit[hits] = bin[j];
        hits += bin[j] >= 0;
    }
    return hits;
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
constexpr LaneLists kLanes;

// The same with a table, because AVX2 has no compress; no compiler makes one of the loop above. Writes 8 entries at a
// time.
__attribute__((target("arch=x86-64-v3"))) int64_t collect_avx2(const int32_t* bin, int64_t n, int32_t* hit) {
    int64_t hits = 0, j = 0;
    for (; j + 8 <= n; j += 8) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bin + j));
        const unsigned found = ~unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(v))) & 0xFFu;
        const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(kLanes.of[found])));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(hit + hits), _mm256_permutevar8x32_epi32(v, lanes));
        hits += _mm_popcnt_u32(found);
    }
    return hits + collect(bin + j, n - j, hit + hits);
}

// The same with a compress. Writes 16 entries at a time.
__attribute__((target("arch=x86-64-v4"))) int64_t collect_avx512(const int32_t* bin, int64_t n, int32_t* hit) {
    int64_t hits = 0, j = 0;
    for (; j + 16 <= n; j += 16) {
        const __m512i v = _mm512_loadu_si512(bin + j);
        const __mmask16 found = _mm512_cmpge_epi32_mask(v, _mm512_setzero_si512());
        _mm512_storeu_si512(hit + hits, _mm512_maskz_compress_epi32(found, v));
        hits += _mm_popcnt_u32(found);
    }
    return hits + collect(bin + j, n - j, hit + hits);
}
#endif

int64_t collect_best(const int32_t* bin, int64_t n, int32_t* hit) {
#if defined(__x86_64__)
    if (isa() == Isa::Avx512) return collect_avx512(bin, n, hit);
    if (isa() == Isa::Avx2) return collect_avx2(bin, n, hit);
#endif
    return collect(bin, n, hit);
}

template <class C>
struct Bins {
    using Key = typename C::Key;

    // Adds keys to counts[kColumns].
    // What can be counted in vectors is: keys outside the window, and zeros, which can be most of a task vector.
    // The others are collected first, since in the usual window few keys fall.
    static SEME_INLINE void count(const Key* key, int64_t n, const Window<C> w, int64_t* counts) {
        int32_t bin[kTile], hit[kTile + 16];
        Key passed = 0, zeros = 0;
        for (int64_t j = 0; j < n; ++j) {
            passed += w.passed(key[j]);
            zeros += key[j] == 0;
            bin[j] = int32_t(w.bin(key[j])) | -int32_t(!w.holds(key[j]) | (key[j] == 0));
        }
        counts[kBins] += passed;
        if (w.lowest == 0) counts[0] += zeros;
        if (w.mask != 0) {
            Key mixed = 0;
            for (int64_t j = 0; j < n; ++j) mixed += w.holds(key[j]) & (w.rest(key[j]) != 0);
            counts[kBins + 1] += mixed;
        }
        const int64_t hits = collect_best(bin, n, hit);
        for (int64_t h = 0; h < hits; ++h) ++counts[hit[h]];
    }
};

// Calls add(counts, begin, end) for elements [begin, end) of n, in several threads; what they count in tables of their
// own is added to out[size].
template <class F>
void count_in_parallel(int64_t n, int64_t size, int64_t* out, int threads, const F& add) {
    const int64_t n_blocks = blocks(n);
    std::mutex lock;
    std::vector<std::vector<int64_t>> others;
    threads = int(std::min<int64_t>(threads, n_blocks / kLeastBlocks));
    parallel_blocks(n_blocks, threads, [&](int64_t b0, int64_t b1) {
        std::vector<int64_t> own(b0 > 0 ? size : 0);
        add(b0 > 0 ? own.data() : out, b0 * kBlock, std::min(n, b1 * kBlock));
        const std::lock_guard<std::mutex> guard(lock);
        others.push_back(std::move(own));
    });
    for (const auto& counts : others)
        for (size_t j = 0; j < counts.size(); ++j) out[j] += counts[j];
}

}  // namespace
}  // namespace seme::cpu
