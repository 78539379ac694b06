#include "variance.cuh"

namespace seme::cuda {
namespace {

constexpr int kPart = kRows * kVector;  // elements that a thread takes of kRows rows

// One team per block of kBlock elements, once for every task vector: the positions are selected anew for each.
template <class C>
__global__ void __launch_bounds__(kThreads)
    selected_squares_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Cuts<C> cuts, bool everything,
                            double* out, int64_t n, int64_t blocks) {
    using T = typename C::T;
    const Team team(blocks);
    const int64_t begin = team.block * kBlock + team.thread * kVector;
    const int experts = in.count - 1;
    const BlockCut<C> cut(cuts, 0, 0, team.block);
    const bool ranked = __ballot_sync(kAllLanes, cut.ranked) != 0;  // in one of the warp's blocks
    for (int i = 0; i < experts; ++i) {
        double sum[kVector] = {};
        int seen = 0;  // ties in the rows before
        for (int64_t at = begin; at < begin + kBlock; at += kRow * kRows) {
            T base[kRows][kVector], d[kPart], v[kPart];
            load_rows<C>(in[0], at, n - at, base);
            const auto delta = [&](int e, T(&x)[kPart]) {
                T rows[kRows][kVector];
                load_rows<C>(in[e + 1], at, n - at, rows);
                for (int r = 0; r < kRows; ++r)
                    for (int k = 0; k < kVector; ++k) x[kVector * r + k] = TaskVector<C>::delta(rows[r][k], base[r][k]);
            };
            for (int j = 0; j < kPart; ++j) v[j] = T(0);
            if (!everything) variance_of<C>(experts, delta, v);
            delta(i, d);
            for (int r = 0; r < kRows; ++r) {
                typename C::Key key[kVector];
                int rank = seen, ties = 0;
                for (int k = 0; k < kVector; ++k) {
                    key[k] = C::key(v[kVector * r + k]);
                    ties += key[k] == cut.tie;
                }
                if (ranked) {
                    int whole;
                    rank += row_ties_before(ties, &whole);
                    seen += whole;
                }
                for (int k = 0; k < kVector; ++k) {
                    rank += key[k] == cut.tie;
                    const bool keep = everything || cut.passes(key[k], rank);
                    sum[k] += double(keep ? Sce<C>::square(d[kVector * r + k]) : T(0));
                }
            }
        }
        const double whole = fold_lanes(sum);
        if (team.first) out[team.block * experts + i] = whole;
    }
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const Kept& kept, double* out, cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        launch(selected_squares_kernel<C>, ceil_div(blocks(n), kThreads / kTeam), kThreads, 0, stream,
               inputs_of(tensors), Cuts<C>::make(kept, 2, blocks(n)), selects_everything(kept), out, n, blocks(n));
    }
};

}  // namespace

void selected_squares(const std::vector<View>& tensors, const Kept& kept, DType compute, double* out, Stream stream) {
    if (tensors[0].n > 0) run_computed<Launch>(compute, tensors, kept, out, use(stream));
}

}  // namespace seme::cuda
