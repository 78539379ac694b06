// The formulas, one element at a time, for the CPU loops and the CUDA kernels alike. Every operation is
// rounded on its own (built with -ffp-contract=off and --fmad=false); C is a compute dtype of numeric.h,
// C::T the type the arithmetic is done in.
#pragma once

#include "numeric.h"

namespace seme {

// weighted_sum: sum_i w_i x_i / divisor, accumulated in C::T and rounded to the compute dtype once, at the end.
template <class C>
struct WeightedSum {
    using T = typename C::T;
    static SEME_HD T first(T w, T x) { return w * x; }
    static SEME_HD T add(T sum, T w, T x) { return sum + w * x; }
    static SEME_HD T finish(T sum, T divisor) { return C::round(sum / divisor); }
};

}  // namespace seme
