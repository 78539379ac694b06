#include "ranks.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../parallel.h"
#include "collect.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

// What keeps an element: rank * spread >= (draw - chance + 1) * steps, which is draw < chance + floor(rank * spread /
// steps) without a division.
struct Chances {
    int64_t chance, spread, steps;
    uint64_t key;

    // Upper halves below the first keep an element of any rank, those from the second on keep none.
    int32_t certain() const { return int32_t(chance >> 16); }
    int32_t hopeless() const { return int32_t((chance + spread + 0xFFFF) >> 16); }

    // What rank * spread must reach at least, where the upper half of the draw is given.
    SEME_INLINE int64_t least(int64_t upper) const { return ((upper << 16) - chance + 1) * steps; }

    // Element e. The lower half decides where the upper one does not, which is so rare that the branch costs nothing.
    SEME_INLINE bool keeps(int64_t rank, int64_t upper, int64_t e) const {
        const int64_t over = rank * spread - least(upper), rest = 0xFFFF * steps;
        bool kept = over >= rest;
        if (__builtin_expect(uint64_t(over) < uint64_t(rest), 0)) kept = over >= half_of(key, e, 1) * steps;
        return kept;
    }
};

// What is kept of one row. Most draws decide without a rank. Zeros, which can be most of a task vector, have the lowest
// ranks, by index. The others are counted in buckets by the upper bits of their keys, and an element's rank lies within
// its bucket's; the few buckets where that is not enough are sorted.
template <class C>
struct Row {
    using T = typename C::T;
    using Key = typename C::Key;
    static constexpr int64_t kLeastBuckets = 64;

    const int64_t row;
    std::vector<Key> keys;
    std::vector<int32_t> upper;          // halves of the draws
    std::vector<int32_t> nonzero, open;  // places of the keys that are not 0, and of those that need a rank
    std::vector<int32_t> first;          // rank of a bucket's first element
    std::vector<uint8_t> mixed;          // buckets that must be sorted
    std::vector<std::pair<int32_t, int32_t>> segments;  // their ranks, first and after the last
    std::vector<int32_t> places;  // by rank in these buckets; of one-key buckets: ranks in them, by place
    int64_t zeros, filled, opened;
    Key low, high;  // of the keys that are not 0
    int shift;

    SEME_INLINE explicit Row(int64_t row)
        : row(row), keys(row), upper(row), nonzero(row + kCollectRoom), open(row + kCollectRoom), places(row) {}

    // mask[0..row) = what is kept of the row that begins at `begin`; `e` is the index in the tensor of its first
    // element.
    SEME_INLINE void run(const View& origin, const View& x, int64_t begin, int64_t e, const Chances& c, uint8_t* mask) {
        load(origin, x, begin, e, c, mask);
        if (opened == 0) return;
        count();
        if (shift == 0) return decide_by_index(e, c, mask);
        const int64_t left = decide(c, mask);
        if (left > 0) sort(left, e, c, mask);
    }

  private:
    // What the loops below take with them, because for all a compiler knows a store might change a member.
    struct Buckets {
        const Key* keys;
        Key low;
        int shift;

        SEME_INLINE int64_t of(int32_t place) const { return int64_t((keys[place] - low) >> shift); }
    };
    SEME_INLINE Buckets buckets() const { return {keys.data(), low, shift}; }

    // Masks of the open elements where a bucket has one key only.
    SEME_INLINE void decide_by_index(int64_t e, const Chances c, uint8_t* mask) const {
        const Buckets in = buckets();
        const int32_t *u = upper.data(), *ranks = first.data(), *within = places.data(), *all = open.data();
        for (int64_t o = 0, n = opened; o < n; ++o) {
            const int32_t j = all[o];
            mask[j] = c.keeps(ranks[in.of(j)] + within[j], u[j], e + j);
        }
    }

    // Masks of the open elements; returns how many are left, which are the first ones then.
    SEME_INLINE int64_t decide(const Chances c, uint8_t* mask) {
        const Buckets in = buckets();
        const int32_t *u = upper.data(), *ranks = first.data();
        int32_t* places = open.data();
        const int64_t count = opened, rest = 0xFFFF * c.steps;
        int64_t left = 0;
        for (int64_t o = 0; o < count; ++o) {
            const int32_t j = places[o];
            const int64_t b = in.of(j), least = c.least(u[j]);
            const bool kept = ranks[b] * c.spread >= least + rest;
            mask[j] = kept;
            places[left] = j;
            left += !kept & ((ranks[b + 1] - 1) * c.spread >= least);
        }
        return left;
    }

    // Keys, draws, and the masks of all that is not open.
    SEME_INLINE void load(const View& origin, const View& x, int64_t begin, int64_t e, const Chances& c,
                          uint8_t* mask) {
        const int32_t certain = c.certain(), hopeless = c.hopeless();
        T base[kTile], d[kTile];
        int32_t memory[kDraws], chosen[kTile];
        Key least = C::kGreatestKey,
            greatest = 0;  // not the members, which a store might change for all a compiler knows
        zeros = filled = opened = 0;
        for (int64_t at = 0; at < row; at += kTile) {
            const int64_t n = std::min(kTile, row - at);
            load_tile<C>(origin, begin + at, n, base);
            load_delta<C>(x, begin + at, n, base, d);
            Key* k = keys.data() + at;
            for (int64_t j = 0; j < n; ++j) {
                k[j] = C::key(d[j]);
                const Key other = k[j] == 0 ? C::kGreatestKey : k[j];
                least = least < other ? least : other;
                greatest = greatest > k[j] ? greatest : k[j];
            }
            const int32_t* u = upper_halves(c.key, e + at, n, memory);
            std::copy_n(u, n, upper.data() + at);
            const int32_t start = int32_t(at);
            for (int64_t j = 0; j < n; ++j) chosen[j] = (start + int32_t(j)) | -int32_t(k[j] == 0);
            const int64_t others = collect(chosen, n, nonzero.data() + filled);
            for (int64_t j = 0; j < n; ++j) chosen[j] |= -int32_t((u[j] < certain) | (u[j] >= hopeless));
            opened += collect(chosen, n, open.data() + opened);
            filled += others;
            if (others < n)
                zeros += decide_zeros(k, n, e + at, u, c, mask + at);
            else
                for (int64_t j = 0; j < n; ++j) mask[at + j] = u[j] < certain;
        }
        low = least, high = greatest;
    }

    // Masks of a tile, where only the zeros may be open: their ranks are how many there are before. Returns how many
    // they are.
    SEME_INLINE int64_t decide_zeros(const Key* k, int64_t n, int64_t e, const int32_t* u, const Chances c,
                                     uint8_t* mask) const {
        uint8_t zero[kTile] = {}, within[kTile];
        int32_t rank[kTile], sum = int32_t(zeros);
        for (int64_t j = 0; j < n; ++j) zero[j] = k[j] == 0;
        for (int64_t g = 0; g < kTile; g += 8) {
            uint64_t bytes;
            std::memcpy(&bytes, zero + g, 8);
            bytes *= 0x0101010101010101u;  // running sums of the bytes
            const int32_t count = int32_t(bytes >> 56);
            bytes <<= 8;
            std::memcpy(within + g, &bytes, 8);
            for (int64_t j = g; j < g + 8; ++j) rank[j] = sum + within[j];
            sum += count;
        }
        // The upper half is compared with the bound of the draw in float32, whose error is below `kError`.
        constexpr float kError = 1.0f / 16;
        const float start = float(c.chance) / 65536, step = float(c.spread) / float(c.steps) / 65536;
        const int32_t certain = c.certain();
        int32_t doubts = 0;
        for (int64_t j = 0; j < n; ++j) {
            const float bound = start + float(rank[j]) * step, draw = float(u[j]);
            const int32_t kept = draw <= bound - (1 + kError), may = draw <= bound + kError, is = k[j] == 0;
            mask[j] = uint8_t((is & kept) | ((is ^ 1) & int32_t(u[j] < certain)));
            doubts += is & (may ^ kept);
        }
        if (doubts > 0)
            for (int64_t j = 0; j < n; ++j)
                if (k[j] == 0) mask[j] = c.keeps(rank[j], u[j], e + j);
        return sum - int32_t(zeros);
    }

    // As many buckets as there are keys, about.
    SEME_INLINE void count() {
        const uint64_t range = uint64_t(high - low), most = uint64_t(std::max(filled, kLeastBuckets));
        shift = 0;
        while (range >> shift >= most) ++shift;
        first.assign(size_t(range >> shift) + 2, 0);
        const Buckets in = buckets();
        int32_t* counts = first.data();
        const int32_t* all = nonzero.data();
        if (shift == 0) {
            int32_t* within = places.data();
            for (int64_t i = 0, n = filled; i < n; ++i) within[all[i]] = counts[in.of(all[i]) + 1]++;
        } else {
            for (int64_t i = 0, n = filled; i < n; ++i) ++counts[in.of(all[i]) + 1];
        }
        int32_t rank = int32_t(zeros);
        for (int32_t& of_bucket : first) of_bucket = rank += of_bucket;
    }

    // Masks in the buckets of the first `left` open elements.
    SEME_INLINE void sort(int64_t left, int64_t e, const Chances& c, uint8_t* mask) {
        const Buckets in = buckets();
        mixed.assign(first.size(), 0);
        segments.clear();
        for (int64_t o = 0; o < left; ++o) {
            const int64_t b = in.of(open[o]);
            if (mixed[b] == 0) segments.emplace_back(first[b], first[b + 1]);
            mixed[b] = 1;
        }
        const uint8_t* flags = mixed.data();
        int32_t *all = nonzero.data(), *ranks = first.data(), *ordered = places.data();
        int64_t members = 0;
        for (int64_t i = 0, n = filled; i < n; ++i) {
            const int32_t j = all[i];
            all[members] = j;
            members += flags[in.of(j)];
        }
        for (int64_t m = 0; m < members; ++m) ordered[ranks[in.of(all[m])]++] = all[m];
        for (const auto& segment : segments) {
            int32_t *begin = places.data() + segment.first, *end = places.data() + segment.second;
            // They are in the order of their indices: nothing to do where they are equal.
            if (!std::is_sorted(begin, end, [&](int32_t a, int32_t b) { return keys[a] < keys[b]; }))
                std::sort(begin, end,
                          [&](int32_t a, int32_t b) { return keys[a] < keys[b] || (keys[a] == keys[b] && a < b); });
            for (const int32_t* p = begin; p < end; ++p) mask[*p] = c.keeps(p - places.data(), upper[*p], e + *p);
        }
    }
};

template <class C>
struct Body {
    static SEME_INLINE void run(const std::vector<View>* tensors, const Selection* s, uint8_t* masks, int64_t r0,
                                int64_t r1) {
        Row<C> row(s->row);
        for (size_t i = 0; i + 1 < tensors->size(); ++i) {
            if (s->spreads[i] == 0) continue;
            const Chances chances{s->chances[i], s->spreads[i], std::max<int64_t>(s->row - 1, 1),
                                  uint64_t(s->seeds[i])};
            for (int64_t at = r0 * s->row; at < r1 * s->row; at += s->row)
                row.run((*tensors)[0], (*tensors)[i + 1], at, s->offset + at, chances,
                        masks + int64_t(i) * (*tensors)[0].n + at);
        }
    }
};

}  // namespace

std::vector<uint8_t> rank_masks(const std::vector<View>& tensors, const Selection& selection, DType compute,
                                int threads) {
    std::vector<uint8_t> masks(size_t(tensors[0].n) * (tensors.size() - 1));
    parallel_blocks(tensors[0].n / selection.row, threads, [&](int64_t r0, int64_t r1) {
        run_computed<Body>(compute, &tensors, &selection, masks.data(), r0, r1);
    });
    return masks;
}

}  // namespace seme::cpu
