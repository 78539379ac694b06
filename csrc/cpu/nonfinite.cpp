#include "../parallel.h"
#include "tile.h"

namespace seme::cpu {
namespace {

// Inf and NaN are the numbers whose exponent bits are all set; so no conversion is needed.
template <class U>
SEME_INLINE int64_t count_tile(const U* bits, int64_t n, U exponent) {
    U found = 0;  // as wide as an element, so that vectors stay full; a tile's count fits in 16 bits
    for (int64_t j = 0; j < n; ++j) found += U((bits[j] & exponent) == exponent);
    return int64_t(found);
}

template <class U>
SEME_INLINE int64_t scan(void* data, int64_t begin, int64_t end, U exponent, bool zero) {
    U* bits = static_cast<U*>(data);
    int64_t total = 0;
    for (int64_t at = begin; at < end; at += kTile) {
        const int64_t n = std::min(kTile, end - at), found = count_tile(bits + at, n, exponent);
        total += found;
        if (zero && found > 0)
            for (int64_t j = at; j < at + n; ++j)
                if ((bits[j] & exponent) == exponent) bits[j] = 0;
    }
    return total;
}

struct Body {
    static SEME_INLINE void run(View v, bool zero, int64_t begin, int64_t end, int64_t* found) {
        switch (v.dtype) {
            case DType::F32: *found = scan<uint32_t>(v.data, begin, end, 0x7F800000u, zero); break;
            case DType::F16: *found = scan<uint16_t>(v.data, begin, end, 0x7C00u, zero); break;
            case DType::BF16: *found = scan<uint16_t>(v.data, begin, end, 0x7F80u, zero); break;
            case DType::F64: *found = scan<uint64_t>(v.data, begin, end, 0x7FF0000000000000u, zero); break;
        }
    }
};

}  // namespace

void nonfinite(const std::vector<View>& tensors, bool zero, int64_t* out, int threads) {
    for (size_t i = 0; i < tensors.size(); ++i) {
        const View v = tensors[i];
        parallel_blocks(blocks(v.n), threads, [&](int64_t b0, int64_t b1) {
            int64_t found = 0;
            run_best<Body>(v, zero, b0 * kBlock, std::min(v.n, b1 * kBlock), &found);
            __atomic_fetch_add(out + i, found, __ATOMIC_RELAXED);
        });
    }
}

}  // namespace seme::cpu
