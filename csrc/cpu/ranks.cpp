#include "ranks.h"

#include <algorithm>
#include <utility>

#include "../parallel.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

// What keeps an element: rank * spread >= (draw - chance + 1) * steps, which is draw < chance + floor(rank * spread /
// steps) without a division.
struct Chances {
    int64_t chance, spread, steps;
    uint64_t key;

    SEME_INLINE int64_t least(int64_t draw) const { return (draw - chance + 1) * steps; }
};

// The ranks within one row, by the upper bits of the keys: elements are counted in buckets, and an element's rank lies
// within its bucket's. Where a bucket has one key only, they are ranked by index. Otherwise the bucket is sorted if,
// and only if, that decides on an element of it.
template <class C>
struct Row {
    using T = typename C::T;
    using Key = typename C::Key;
    static constexpr int kKeyBits = std::is_same_v<C, ComputeF64> ? 63 : std::is_same_v<C, ComputeF32> ? 31 : 15;
    static constexpr int kShift = kKeyBits - 15;

    struct Bucket {
        int32_t first, last;  // ranks that its elements may have; `first` counts them at first
        int32_t step;         // from one element to the next: 1 if they are ranked by index
        bool open;
    };

    const int64_t row;
    std::vector<Key> keys, any, every;  // of a bucket: the bits that any and that every key of it has
    std::vector<int32_t> places, upper;
    std::vector<Bucket> buckets;
    std::vector<std::pair<Key, int32_t>> sorted;

    SEME_INLINE explicit Row(int64_t row) : row(row), keys(row), places(row), upper(row) {}

    // mask[0..row) = what is kept of the row that begins at `begin`; `e` is the index in the tensor of its first
    // element.
    SEME_INLINE void run(const View& origin, const View& x, int64_t begin, int64_t e, const Chances& c, uint8_t* mask) {
        const size_t count = load(origin, x, begin, e, c.key);
        fill(count);
        bool open = false;
        const int64_t rest = 0xFFFF * c.steps;
        for (int64_t j = 0; j < row; ++j) {
            Bucket& bucket = buckets[places[j]];
            const int64_t least = c.least(int64_t(upper[j]) << 16), first = bucket.first * c.spread;
            const int64_t last = bucket.step == 1 ? first : bucket.last * c.spread;
            const bool kept = first >= least + rest;
            mask[j] = kept;
            if (!kept && last >= least) {
                if (bucket.step == 1) {
                    mask[j] = first >= c.least(draw(e, j, c.key));
                } else {
                    bucket.open = open = true;
                }
            }
            bucket.first += bucket.step;
        }
        if (open) sort(e, c, mask);
    }

  private:
    // Keys, upper halves of draws and buckets: zero has the first one, the smallest other key the second. Returns how
    // many buckets that makes.
    SEME_INLINE size_t load(const View& origin, const View& x, int64_t begin, int64_t e, uint64_t key) {
        T base[kTile], d[kTile];
        int32_t memory[kDraws];
        Key low = C::kGreatestKey, high = 0;
        for (int64_t at = 0; at < row; at += kTile) {
            const int64_t n = std::min(kTile, row - at);
            load_tile<C>(origin, begin + at, n, base);
            load_delta<C>(x, begin + at, n, base, d);
            Key* k = keys.data() + at;
            for (int64_t j = 0; j < n; ++j) {
                k[j] = C::key(d[j]);
                const Key least = k[j] == 0 ? C::kGreatestKey : k[j];
                low = low < least ? low : least;
                high = high > k[j] ? high : k[j];
            }
            std::copy_n(upper_halves(key, e + at, n, memory), n, upper.data() + at);
        }
        const Key first = (low >> kShift) - 1;
        for (int64_t j = 0; j < row; ++j) places[j] = keys[j] == 0 ? 0 : int32_t((keys[j] >> kShift) - first);
        return size_t(std::max<Key>((high >> kShift) - first, 0)) + 1;
    }

    SEME_INLINE void fill(size_t count) {
        buckets.assign(count, {0, 0, 0, false});
        any.assign(count, 0);
        every.assign(count, Key(-1));
        for (int64_t j = 0; j < row; ++j) {
            const int32_t place = places[j];
            ++buckets[place].first;
            if (kShift > 0) {
                any[place] |= keys[j];
                every[place] &= keys[j];
            }
        }
        int32_t before = 0;
        for (size_t b = 0; b < count; ++b) {
            Bucket& bucket = buckets[b];
            const int32_t size = std::exchange(bucket.first, before);
            before += size;
            bucket.last = before - 1;
            bucket.step = kShift == 0 || any[b] == every[b];
        }
    }

    SEME_INLINE int64_t draw(int64_t e, int64_t j, uint64_t key) const {
        return int64_t(upper[j]) << 16 | half_of(key, e + j, 1);
    }

    SEME_INLINE void sort(int64_t e, const Chances& c, uint8_t* mask) {
        sorted.clear();
        for (int64_t j = 0; j < row; ++j)
            if (buckets[places[j]].open) sorted.emplace_back(keys[j], int32_t(j));
        std::sort(sorted.begin(), sorted.end());
        for (size_t s = 0; s < sorted.size(); ++s) {
            const int64_t j = sorted[s].second;
            Bucket& bucket = buckets[places[j]];
            mask[j] = bucket.first++ * c.spread >= c.least(draw(e, j, c.key));
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
