// Which elements of a task vector a kernel keeps: see Selection in ../seme.h.
#pragma once

#include "../philox.h"
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

constexpr int kMaxCuts = 2;  // per task vector

// What an element of one task vector is drawn by.
struct Draw {
    int64_t chance;
    uint64_t key;
};

template <class C>
struct Cuts {
    Threshold<C> v[kMaxCuts * kMaxTensors];
    int count, per_tensor;  // task vectors, and cuts of each
    PerTensor<Draw> draws;
    int64_t offset;
    bool random;
    const int64_t* tie_ends;  // [cuts, blocks], or null
    int64_t blocks;

    static Cuts make(const Kept& kept, size_t tensors, int64_t blocks) {
        Cuts c{};
        for (size_t i = 0; i < kept.thresholds.size(); ++i) c.v[i] = {key_bound<C>(kept.thresholds[i]), kept.quotas[i]};
        c.count = int(tensors) - 1;
        c.per_tensor = c.count > 0 ? int(kept.thresholds.size()) / c.count : 0;
        c.random = !kept.chances.empty();
        for (size_t i = 0; i < kept.chances.size(); ++i) c.draws.v[i] = {kept.chances[i], uint64_t(kept.seeds[i])};
        c.offset = kept.offset;
        c.tie_ends = kept.tie_ends;
        c.blocks = blocks;
        return c;
    }
};

// What lies above a cut in a block of elements: keys from `from` on and, if the quota ends in this block (`ranked`,
// which few blocks are), the first `quota` of the keys equal to `tie`.
template <class C>
struct BlockCut {
    using Key = typename C::Key;
    Key tie, from;
    int quota;
    bool ranked;

    // Cut number `cut` of task vector i.
    __device__ BlockCut(const Cuts<C>& cuts, int cut, int i, int64_t block) {
        i += cut * cuts.count;
        const Threshold<C> t = cuts.v[i];
        int64_t left = t.quota;
        ranked = false;
        if (cuts.tie_ends) {
            const int64_t* ends = cuts.tie_ends + i * cuts.blocks;
            const int64_t before = block > 0 ? ends[block - 1] : 0;
            left -= before;
            ranked = left > 0 && left < ends[block] - before;
        }
        tie = t.key;
        from = left > 0 && !ranked ? t.key : t.key + 1;
        quota = ranked ? int(left) : 0;
    }
    // `rank`: which tie of the block this is, from 1 on; only looked at if `ranked` and the key is a tie.
    __device__ bool passes(Key key, int rank) const { return key >= from || (key == tie && rank <= quota); }
};

// stays[j]: whether element e + j is drawn; one block of numbers for all of them where it begins with e.
template <int N>
__device__ __forceinline__ void draw(const Draw& d, int64_t e, bool (&stays)[N]) {
    static_assert(N <= kPerBlock, "two blocks at most");
    const int first = int(e % kPerBlock);
    const Philox block = Philox::at(d.key, uint64_t(e) / kPerBlock, 0);
    const Philox next = first + N <= kPerBlock ? block : Philox::at(d.key, uint64_t(e) / kPerBlock + 1, 0);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const int place = first + j;
        stays[j] =
            is_drawn(place < kPerBlock ? block.half(place) : next.half(place - kPerBlock), d.chance, d.key, e + j);
    }
}

// x = 0 where the element of task vector i is not kept; x[0] is at place `at` of the call. Every thread of the block,
// of kTile elements, has to call it.
template <class C>
__device__ void keep(const Cuts<C>& cuts, int i, int64_t at, typename C::T (&x)[kVector]) {
    typename C::Key key[kVector];
    for (int j = 0; j < kVector; ++j) key[j] = C::key(x[j]);
    for (int number = 0; number < cuts.per_tensor; ++number) {
        const BlockCut<C> cut(cuts, number, i, blockIdx.x);
        int rank = 0;
        if (cut.ranked) {
            for (int j = 0; j < kVector; ++j) rank += key[j] == cut.tie;
            rank = sum_before(rank);
        }
        for (int j = 0; j < kVector; ++j) {
            rank += key[j] == cut.tie;
            x[j] = keep_if(cut.passes(key[j], rank) == (number == 0), x[j]);
        }
    }
    if (cuts.random && cuts.draws[i].chance < kCertain) {
        bool stays[kVector];
        draw(cuts.draws[i], cuts.offset + at, stays);
        for (int j = 0; j < kVector; ++j) x[j] = keep_if(stays[j], x[j]);
    }
}

// Ties of this row of 64 elements in the team's threads before this one, and in the whole row, given those of this
// thread. Called by the whole warp.
__device__ __forceinline__ int row_ties_before(int mine, int* whole) {
    const int lane = threadIdx.x % kWarp, thread = lane % kTeam;
    int sum = mine;
#pragma unroll
    for (int d = 1; d < kTeam; d *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, d);
        if (thread >= d) sum += other;
    }
    *whole = __shfl_sync(kAllLanes, sum, lane - thread + kTeam - 1);
    return sum - mine;
}

// Whether a selection of one threshold leaves nothing out.
inline bool selects_everything(const Kept& s) { return s.thresholds[0] == 0 && s.quotas[0] > 0; }

}  // namespace seme::cuda
