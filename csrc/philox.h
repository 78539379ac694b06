// Philox 4x32-10, the counter-based random generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2,
// 3"): the numbers of an element depend on the key and on its index alone. seme/ops/_philox.py is its twin in torch.
#pragma once

#include "numeric.h"

namespace seme {

struct Philox {
    uint32_t w[4];

    // The four words of a block of counters.
    static SEME_HD Philox at(uint64_t key, uint64_t block, uint32_t plane) {
        uint32_t a = uint32_t(block), b = uint32_t(block >> 32), c = plane, d = 0;
        uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t p = uint64_t(a) * 0xD2511F53u, q = uint64_t(c) * 0xCD9E8D57u;
            a = uint32_t(q >> 32) ^ b ^ k0;
            c = uint32_t(p >> 32) ^ d ^ k1;
            b = uint32_t(q);
            d = uint32_t(p);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return {{a, b, c, d}};
    }
    // The j-th of its eight 16-bit numbers.
    SEME_HD int32_t half(int j) const {
        const uint32_t word = j < 4 ? (j < 2 ? w[0] : w[1]) : (j < 6 ? w[2] : w[3]);
        return int32_t(word >> (j % 2 * 16) & 0xFFFFu);
    }
};

// Element e of a tensor draws a number of 32 bits: its upper half is number e % 8 of block e / 8 in plane 0, the lower
// half that in plane 1. The lower one is needed only where the upper one leaves a comparison open, once in 65536.
constexpr int kPerBlock = 8;
constexpr int64_t kCertain = int64_t(1) << 32;  // the chance of what is always kept

SEME_HD int32_t half_of(uint64_t key, int64_t e, uint32_t plane) {
    return Philox::at(key, uint64_t(e) / kPerBlock, plane).half(int(uint64_t(e) % kPerBlock));
}

// Whether element e, whose upper half is given, is kept with a chance of `chance` / 2^32.
SEME_HD bool is_drawn(int32_t upper, int64_t chance, uint64_t key, int64_t e) {
    const int32_t bound = int32_t(chance >> 16);
    return upper < bound || (upper == bound && half_of(key, e, 1) < int32_t(chance & 0xFFFF));
}

}  // namespace seme
