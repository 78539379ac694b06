// Counting keys in the bins of a window, which the histograms of magnitudes and of what is made of them share.
#pragma once

#include <mutex>

#include "../formulas.h"
#include "../parallel.h"
#include "collect.h"
#include "tile.h"

namespace seme::cpu {
namespace {

constexpr int64_t kColumns = kBins + 2;  // the bins, keys beyond the window, keys that are not the first of their bin
constexpr int64_t kLeastBlocks = 32;     // per thread; for fewer, a histogram of its own costs more than it saves

template <class C>
struct Bins {
    using Key = typename C::Key;

    // Adds keys to counts[kColumns].
    // What can be counted in vectors is: keys outside the window, and zeros, which can be most of a task vector.
    // The others are collected first, since in the usual window few keys fall.
    static SEME_INLINE void count(const Key* key, int64_t n, const Window<C> w, int64_t* counts) {
        int32_t bin[kTile], hit[kTile + kCollectRoom];
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
        const int64_t hits = collect(bin, n, hit);
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
