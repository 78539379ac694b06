// Which elements of a task vector a kernel keeps: those above the threshold, and the first ties with it.
#pragma once

#include "tile.cuh"

namespace seme::cuda {

// A bound on keys as the type that keys have; one beyond all keys becomes the first that none reaches.
template <class C>
typename C::Key key_bound(int64_t bound) {
    return bound <= C::kGreatestKey ? typename C::Key(bound) : typename C::Key(C::kGreatestKey + 1);
}

template <class C>
struct Threshold {
    typename C::Key key;
    int64_t quota;
};

template <class C>
struct Thresholds : PerTensor<Threshold<C>> {
    const int64_t* tie_ends;  // [tensors, blocks], or null
    int64_t blocks;

    static Thresholds make(const Selection& s, int64_t blocks) {
        Thresholds t{};
        for (size_t i = 0; i < s.thresholds.size(); ++i) t.v[i] = {key_bound<C>(s.thresholds[i]), s.quotas[i]};
        t.tie_ends = s.tie_ends;
        t.blocks = blocks;
        return t;
    }
};

// What a block of elements keeps of one task vector: keys from `from` on and, if the quota ends in this block
// (`ranked`, which few blocks are), the first `quota` of the keys equal to `tie`.
template <class C>
struct BlockSelection {
    using Key = typename C::Key;
    Key tie, from;
    int quota;
    bool ranked;

    __device__ BlockSelection(const Thresholds<C>& thresholds, int i, int64_t block) {
        const Threshold<C> t = thresholds[i];
        int64_t left = t.quota;
        ranked = false;
        if (thresholds.tie_ends) {
            const int64_t* ends = thresholds.tie_ends + i * thresholds.blocks;
            const int64_t before = block > 0 ? ends[block - 1] : 0;
            left -= before;
            ranked = left > 0 && left < ends[block] - before;
        }
        tie = t.key;
        from = left > 0 && !ranked ? t.key : t.key + 1;
        quota = ranked ? int(left) : 0;
    }
    // `rank`: which tie of the block this is, from 1 on; only looked at if `ranked` and the key is a tie.
    __device__ bool keeps(Key key, int rank) const { return key >= from || (key == tie && rank <= quota); }
};

}  // namespace seme::cuda
