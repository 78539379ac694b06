#include "../parallel.h"
#include "deltas.h"

namespace seme::cpu {
namespace {

// count[0..n) = how many of the task vectors change each element.
template <class C>
SEME_INLINE void count_changes(const typename C::T* deltas, size_t models, int64_t n, typename C::T epsilon,
                               typename C::T* count) {
    using T = typename C::T;
    std::fill(count, count + n, T(0));
    for (size_t i = 0; i < models; ++i)
        for (int64_t j = 0; j < n; ++j) count[j] += keep_if(Ram<C>::changes(deltas[i * kTile + j], epsilon), T(1));
}

template <class C>
struct Body {
    using T = typename C::T;

    static SEME_INLINE void run(const std::vector<View>* tensors, const std::vector<double>* scales, double epsilon,
                                bool rounded, View out, int64_t b0, int64_t b1) {
        const size_t models = tensors->size() - 1;
        const T eps = T(epsilon);
        std::vector<T> deltas(models * kTile);
        T base[kTile], count[kTile], sum[kTile];
        const int64_t end = std::min(out.n, b1 * kBlock);
        for (int64_t at = b0 * kBlock; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_deltas<C>(*tensors, at, n, base, deltas.data());
            count_changes<C>(deltas.data(), models, n, eps, count);
            for (int64_t j = 0; j < n; ++j) count[j] = count[j] > T(1) ? count[j] : T(1);
            std::fill(sum, sum + n, T(0));
            for (size_t i = 0; i < models; ++i) {
                const T* d = deltas.data() + i * kTile;
                const T scale = T((*scales)[i]);
                for (int64_t j = 0; j < n; ++j)
                    sum[j] += Ram<C>::term(d[j], Ram<C>::changes(d[j], eps), count[j], scale);
            }
            if (rounded)
                for (int64_t j = 0; j < n; ++j) base[j] = Ram<C>::finish(base[j], sum[j], true);
            else
                for (int64_t j = 0; j < n; ++j) base[j] = Ram<C>::finish(base[j], sum[j], false);
            store_tile(base, n, out, at);
        }
    }
};

template <class C>
struct Count {
    using T = typename C::T;

    // Adds (changed by others too, changed by this one alone) to counts[models, 2] for blocks [b0, b1).
    static SEME_INLINE void run(const std::vector<View>* tensors, double epsilon, int64_t* counts, int64_t b0,
                                int64_t b1) {
        const size_t models = tensors->size() - 1;
        const T eps = T(epsilon);
        std::vector<T> deltas(models * kTile);
        T base[kTile], count[kTile];
        const int64_t end = std::min((*tensors)[0].n, b1 * kBlock);
        for (int64_t at = b0 * kBlock; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_deltas<C>(*tensors, at, n, base, deltas.data());
            count_changes<C>(deltas.data(), models, n, eps, count);
            for (size_t i = 0; i < models; ++i) {
                const T* d = deltas.data() + i * kTile;
                typename C::Key shared = 0, alone = 0;
                for (int64_t j = 0; j < n; ++j) {
                    const bool changed = Ram<C>::changes(d[j], eps);
                    shared += changed & (count[j] > T(1));
                    alone += changed & !(count[j] > T(1));
                }
                counts[2 * i] += shared;
                counts[2 * i + 1] += alone;
            }
        }
    }
};

}  // namespace

void ram(const std::vector<View>& tensors, const std::vector<double>& scales, double epsilon, bool rounded,
         DType compute, View out, int threads) {
    parallel_blocks(blocks(out.n), threads, [&](int64_t b0, int64_t b1) {
        run_computed<Body>(compute, &tensors, &scales, epsilon, rounded, out, b0, b1);
    });
}

void overlap_counts(const std::vector<View>& tensors, double epsilon, DType compute, int64_t* out, int threads) {
    const int64_t n_blocks = blocks(tensors[0].n), models = int64_t(tensors.size()) - 1;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n_blocks));
    std::vector<int64_t> counts(parts * models * 2);
    parallel_parts(parts, [&](int64_t p) {
        run_computed<Count>(compute, &tensors, epsilon, counts.data() + p * models * 2, n_blocks * p / parts,
                            n_blocks * (p + 1) / parts);
    });
    for (size_t at = 0; at < counts.size(); ++at) out[at % (models * 2)] += counts[at];
}

}  // namespace seme::cpu
