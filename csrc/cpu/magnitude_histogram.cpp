#include "../parallel.h"
#include "task_vector.h"

namespace seme::cpu {
namespace {

constexpr int64_t kGroup = 16;
constexpr int64_t kColumns = kBins + 2;  // the bins, the keys beyond the window, the bits bins do not tell apart

template <class C>
struct Body {
    using T = typename C::T;
    using Key = typename C::Key;

    static SEME_INLINE void run(const std::vector<View>* tensors, const Window<C>* windows, int64_t* out,
                                int64_t begin, int64_t end) {
        T base[kTile], d[kTile];
        Key key[kTile], bin[kTile], hit[kTile + 1];
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = std::min(kTile, end - at);
            load_tile<C>((*tensors)[0], at, n, base);
            for (size_t i = 0; i + 1 < tensors->size(); ++i) {
                const Window<C> w = windows[i];
                int64_t* counts = out + int64_t(i) * kColumns;
                load_delta<C>((*tensors)[i + 1], at, n, base, d);
                Key zeros = 0, passed = 0, rest = 0;
                for (int64_t j = 0; j < n; ++j) key[j] = C::key(d[j]);
                for (int64_t j = 0; j < n; ++j) {
                    passed += w.passed(key[j]);
                    zeros += key[j] == 0;
                    rest |= keep_if(w.holds(key[j]), w.rest(key[j]));
                }
                for (int64_t j = 0; j < n; ++j)
                    bin[j] = Key(w.bin(key[j]) | -Key(!w.holds(key[j]) | (key[j] == 0)));
                // The hits are collected without a branch; groups without any, most in a narrow window, are passed over.
                int64_t hits = 0;
                for (int64_t g = 0; g < n; g += kGroup) {
                    const int64_t stop = std::min(kGroup, n - g);
                    Key top = -1;
                    for (int64_t j = 0; j < stop; ++j) top = std::max(top, bin[g + j]);
                    if (top < 0) continue;
                    for (int64_t j = 0; j < stop; ++j) {
                        hit[hits] = bin[g + j];
                        hits += bin[g + j] >= 0;
                    }
                }
                for (int64_t h = 0; h < hits; ++h) ++counts[hit[h]];
                if (w.lowest == 0) counts[0] += zeros;
                counts[kBins] += passed;
                counts[kBins + 1] |= rest;
            }
        }
    }
};

template <class C>
struct Make {
    static void run(const std::vector<View>* tensors, const int64_t* lowest, const int64_t* shift, int64_t* out,
                    int64_t begin, int64_t end) {
        std::vector<Window<C>> windows;
        for (size_t i = 0; i + 1 < tensors->size(); ++i) windows.push_back(Window<C>::make(lowest[i], int(shift[i])));
        run_best<Body<C>>(tensors, (const Window<C>*)windows.data(), out, begin, end);
    }
};

}  // namespace

void magnitude_histogram(const std::vector<View>& tensors, const std::vector<int64_t>& lowest,
                         const std::vector<int64_t>& shift, DType compute, int64_t* out, int threads) {
    (void)threads;
    const int64_t n = tensors[0].n;
    switch (compute) {
        case DType::F32: return Make<ComputeF32>::run(&tensors, lowest.data(), shift.data(), out, 0, n);
        case DType::F16: return Make<ComputeF16>::run(&tensors, lowest.data(), shift.data(), out, 0, n);
        case DType::BF16: return Make<ComputeBF16>::run(&tensors, lowest.data(), shift.data(), out, 0, n);
        case DType::F64: return Make<ComputeF64>::run(&tensors, lowest.data(), shift.data(), out, 0, n);
    }
}

}  // namespace seme::cpu
