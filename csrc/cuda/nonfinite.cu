#include "tile.cuh"

namespace seme::cuda {
namespace {

// Counts elements whose exponent bits are all ones, on the bits as they are stored.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    nonfinite_kernel(const Bits* data, bool aligned, Bits exponent, unsigned long long* count, int64_t n) {
    const Share share(n);
    Bits bits[kVector];
    load_raw(data + share.at, share.count, aligned, bits);
    unsigned found = 0;
    for (int j = 0; j < kVector; ++j) found += (bits[j] & exponent) == exponent;
    found = __reduce_add_sync(kAllLanes, found);
    if (threadIdx.x % kWarp == 0 && found) atomicAdd(count, (unsigned long long)found);
}

template <class Bits>
void count_bits(const View& v, Bits exponent, int64_t* count, cudaStream_t stream) {
    launch(nonfinite_kernel<Bits>, ceil_div(v.n, kTile), kThreads, 0, stream, static_cast<const Bits*>(v.data),
           is_aligned(v.data), exponent, reinterpret_cast<unsigned long long*>(count), v.n);
}

}  // namespace

void nonfinite(const std::vector<View>& tensors, int64_t* counts, Stream stream) {
    const cudaStream_t s = use(stream);
    for (size_t i = 0; i < tensors.size(); ++i) {
        const View& v = tensors[i];
        if (v.n == 0) continue;
        switch (v.dtype) {
            case DType::F32: count_bits<uint32_t>(v, 0x7F800000u, counts + i, s); break;
            case DType::F16: count_bits<uint16_t>(v, 0x7C00u, counts + i, s); break;
            case DType::BF16: count_bits<uint16_t>(v, 0x7F80u, counts + i, s); break;
            case DType::F64: count_bits<unsigned long long>(v, 0x7FF0000000000000ull, counts + i, s); break;
        }
    }
}

}  // namespace seme::cuda
