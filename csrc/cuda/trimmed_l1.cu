#include "../formulas.h"
#include "selection.cuh"

namespace seme::cuda {
namespace {

// One team per block of kBlock elements.
template <class C>
__global__ void __launch_bounds__(kThreads)
    trimmed_l1_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Cuts<C> cuts, double* out, int64_t n,
                      int64_t blocks) {
    const Team team(blocks);
    const int64_t begin = team.block * kBlock + team.thread * kVector;
    for (int i = 0; i < in.count - 1; ++i) {
        const BlockCut<C> cut[kMaxCuts] = {{cuts, 0, i, team.block},
                                           {cuts, cuts.per_tensor == kMaxCuts, i, team.block}};
        // In one of the warp's blocks.
        const bool ranked = __ballot_sync(kAllLanes, cut[0].ranked || cut[1].ranked) != 0;
        double all[kVector] = {}, kept[kVector] = {};
        int seen[kMaxCuts] = {};  // ties in the rows before
        for (int64_t at = begin; at < begin + kBlock; at += kRow * kRows) {
            typename C::T base[kRows][kVector], x[kRows][kVector];
            load_rows<C>(in[0], at, n - at, base);
            load_rows<C>(in[i + 1], at, n - at, x);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                typename C::Key key[kVector];
                bool keep[kVector];
                for (int k = 0; k < kVector; ++k) {
                    x[r][k] = TaskVector<C>::delta(x[r][k], base[r][k]);
                    key[k] = C::key(x[r][k]);
                    keep[k] = true;
                }
                if (cuts.random) draw(cuts.draws[i], cuts.offset + at + kRow * r, keep);
#pragma unroll
                for (int number = 0; number < kMaxCuts; ++number) {
                    if (number >= cuts.per_tensor) break;
                    int rank = seen[number];
                    if (ranked) {
                        int ties = 0, whole;
                        for (int k = 0; k < kVector; ++k) ties += key[k] == cut[number].tie;
                        rank += row_ties_before(ties, &whole);
                        seen[number] += whole;
                    }
                    for (int k = 0; k < kVector; ++k) {
                        rank += key[k] == cut[number].tie;
                        keep[k] = keep[k] && cut[number].passes(key[k], rank) == (number == 0);
                    }
                }
                for (int k = 0; k < kVector; ++k) {
                    const double size = double(x[r][k] < 0 ? -x[r][k] : x[r][k]);
                    all[k] += size;
                    kept[k] += keep[k] ? size : 0.0;
                }
            }
        }
        const double whole = fold_lanes(all), part = fold_lanes(kept);
        if (team.first) {
            double* entry = out + (team.block * (in.count - 1) + i) * 2;
            entry[0] = whole;
            entry[1] = part;
        }
    }
}

template <class C>
struct Launch {
    static void run(const std::vector<View>& tensors, const Kept& kept, double* out, cudaStream_t stream) {
        const int64_t n = tensors[0].n;
        launch(trimmed_l1_kernel<C>, ceil_div(blocks(n), kThreads / kTeam), kThreads, 0, stream, inputs_of(tensors),
               Cuts<C>::make(kept, tensors.size(), blocks(n)), out, n, blocks(n));
    }
};

}  // namespace

void trimmed_l1(const std::vector<View>& tensors, const Kept& kept, DType compute, double* out, Stream stream) {
    if (tensors[0].n > 0) run_computed<Launch>(compute, tensors, kept, out, use(stream));
}

}  // namespace seme::cuda
