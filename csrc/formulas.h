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

// What the ops on task vectors share: the element d = x - b of a task vector, 0 where it is not kept, and the end of a
// merge, where the merged task vector is divided, scaled and added to the base. (x / 1 and x * 1 change nothing, so
// they may be skipped.)
template <class C>
struct TaskVector {
    using T = typename C::T;
    static SEME_HD T delta(T x, T b) { return C::round(x - b); }
    // The share of what is kept of it in the sum.
    static SEME_HD T term(T w, T d, T factor) { return C::round(w * scale(d, factor)); }
    static SEME_HD T divide(T s, T divisor) { return divisor == T(1) ? s : C::round(s / divisor); }
    static SEME_HD T scale(T s, T factor) { return factor == T(1) ? s : C::round(s * factor); }
    static SEME_HD T add(T b, T s) { return C::round(b + s); }
};

// task_vector_sum: b + scale * (sum_i w_i d_i) / divisor; the sum of the rounded products is held in C::T.
template <class C>
struct TaskVectorSum {
    using T = typename C::T;
    using V = TaskVector<C>;
    static SEME_HD T finish(T b, T sum, T divisor, T scale) {
        return V::add(b, V::scale(V::divide(C::round(sum), divisor), scale));
    }
};

// line_sum: sums of tensors, or of task vectors, the latter with rounded products; they start at 0 and are held in
// C::T.
template <class C>
struct LineSum {
    using T = typename C::T;
    static SEME_HD T term(T w, T x) { return w * x; }
    static SEME_HD T relative_term(T w, T d) { return C::round(w * d); }
};

// nearswap: a share of b, the other tensor, that falls with its distance from a, the base. A NaN stays one, as every
// comparison with it is false.
template <class C>
struct NearSwap {
    using T = typename C::T;
    static SEME_HD T distance(T a, T b) {
        const T d = C::round(a - b);
        return d < T(0) ? -d : d;
    }
    static SEME_HD T at_least(T d, T least) { return d < least ? least : d; }
    static SEME_HD T share(T d, T t) { return C::round(C::round(T(1) / d) * t); }
    static SEME_HD T clamp(T s) {
        s = s < T(0) ? T(0) : s;
        return s > T(1) ? T(1) : s;
    }
    static SEME_HD T mix(T a, T b, T s) { return C::round(C::round(s * b) + C::round(C::round(T(1) - s) * a)); }
};

// variance_histogram and what goes with it: the population variance of an element over n task vectors, in float64,
// rounded once. Deviations are taken from the first task vector. The first
// is 0, so n sum e^2 - (sum e)^2 is at least sum e^2: little cancels, and only equal task vectors give 0.
template <class C>
struct Variance {
    using T = typename C::T;
    static SEME_HD double deviation(T d, T first) { return double(d) - double(first); }
    static SEME_HD T finish(double sum, double squares, double n) {
        return C::round(T((n * squares - sum * sum) / (n * n)));
    }
};

// sce: elect the sign of the sum of the selected task vectors, average those that have it by the models' coefficients.
template <class C>
struct Sce {
    using T = typename C::T;
    using V = TaskVector<C>;
    static SEME_HD T square(T d) { return C::round(d * d); }
    static SEME_HD T term(T coefficient, T d) { return C::round(coefficient * d); }
    // num / den of sums that are rounded here; a den below 1e-6 counts as 1e-6.
    static SEME_HD T finish(T b, T num, T den) {
        const T least = C::round(T(1e-6)), divisor = C::round(den);
        return V::add(b, C::round(C::round(num) / (divisor < least ? least : divisor)));
    }
};

// ram, overlap_counts: a model changes an element where its task vector lies outside [-epsilon, epsilon], or is NaN.
// Where one model does, its change counts in full, times a scale; where several do, the mean of them.
template <class C>
struct Ram {
    using T = typename C::T;
    static SEME_HD bool changes(T d, T epsilon) { return !((d >= -epsilon) & (d <= epsilon)); }
    // One model's part, where `count` >= 1 models change the element.
    static SEME_HD T term(T d, bool changed, T count, T scale) {
        const T part = keep_if(changed, d), shared = C::round(part / count), alone = part * scale;
        return keep_if(count > T(1), shared) + keep_if(!(count > T(1)), alone);
    }
    // `rounded` says whether the merged task vector and the result are rounded to the compute dtype.
    static SEME_HD T finish(T b, T sum, bool rounded) {
        return rounded ? TaskVector<C>::add(b, C::round(sum)) : b + sum;
    }
};

// importance_histogram, importance_fusion: |d| times the factor of the row. Its key grows with it; in the 16-bit types,
// whose factors may be negative, keys of negative numbers lie below 2^15.
template <class C>
struct Importance {
    using T = typename C::T;
    using Key = typename C::Key;
    static constexpr bool kSigned = C::kGreatestKey < 0x8000;
    static constexpr Key kGreatestKey = kSigned ? C::kGreatestKey + 0x8000 : C::kGreatestKey;
    static SEME_HD T score(T d, T factor) { return C::round((d < T(0) ? -d : d) * factor); }
    static SEME_HD Key key(T score) {
        const Key k = C::key(score);
        if constexpr (kSigned) return score < T(0) ? Key(0x8000 - k) : Key(0x8000 + k);
        return k;
    }
    static SEME_HD T finish(T b, T d, T score, T threshold) { return b + keep_if(score >= threshold, d); }
};

// magnitude_histogram: where a key (C::key, the magnitude as an integer) falls in a window of kBins bins.
constexpr int64_t kBins = 65536;

template <class C>
struct Window {
    using Key = typename C::Key;
    Key lowest;  // first key of the window
    Key last;    // last key of the window; keys after it lie beyond
    int shift;   // log2 of the keys per bin
    Key mask;    // (1 << shift) - 1

    static SEME_HD Window make(int64_t lowest, int shift) {
        // Unsigned, because lowest + (kBins << shift) may pass 2^63; keys do not.
        const uint64_t greatest = uint64_t(C::kGreatestKey);
        const uint64_t last = uint64_t(lowest) + ((uint64_t(kBins) << shift) - 1);
        const int most = 8 * int(sizeof(Key)) - 1;
        const int s = shift < most ? shift : most;
        return {Key(uint64_t(lowest) <= greatest ? uint64_t(lowest) : greatest + 1),
                Key(last < greatest ? last : greatest), s, Key((uint64_t(1) << s) - 1)};
    }
    SEME_HD bool holds(Key key) const { return (key >= lowest) & (key <= last); }
    SEME_HD bool passed(Key key) const { return key > last; }
    SEME_HD Key bin(Key key) const { return (key - lowest) >> shift; }
    SEME_HD Key rest(Key key) const { return (key - lowest) & mask; }
};

// ties: weight, elect the sign of the sum, average the terms that have it. All sums start at 0 and are held in C::T in
// the order of the inputs; an element that is not kept is 0.
template <class C>
struct Ties {
    using T = typename C::T;
    using V = TaskVector<C>;
    // The elected sign, 1 or -1, of a sum that has been rounded: +1 for 0, -1 for NaN.
    static SEME_HD T elect(T sum) { return T(-1) + keep_if(sum >= T(0), T(2)); }
    static SEME_HD T sign(T sum) { return elect(C::round(sum)); }
    // 1 where a term has the elected sign, else 0; 0 and NaN never agree. Terms and weights are multiplied by it
    // before they are summed, so a NaN goes through to the result.
    static SEME_HD T agrees(T term, T sign) { return keep_if(term * sign > T(0), T(1)); }
    // num / den of rounded sums, where a den of 0 counts as 1.
    static SEME_HD T mean(T num, T den) { return C::round(num / (den + keep_if(den == T(0), T(1)))); }
    static SEME_HD T finish(T b, T num, T den, bool normalize, T scale) {
        return V::add(b, V::scale(normalize ? mean(C::round(num), C::round(den)) : C::round(num), scale));
    }
};

}  // namespace seme
