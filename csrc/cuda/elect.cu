#include "matrix.cuh"

namespace seme::cuda {
namespace {

using Count = unsigned long long;
constexpr int64_t kBins = 65536;
constexpr int kFew = 4;

// The variance over experts of one position, and its key; sums in the order of the experts.
template <int kMost, class Sum>
__device__ __forceinline__ int32_t variance_key(const Sum (&z)[kMost][kResults], int i, int count) {
    Sum mean = z[0][i];
#pragma unroll
    for (int m = 1; m < kMost; ++m)
        if (m < count) mean += z[m][i];
    mean /= Sum(count);
    Sum squares = (z[0][i] - mean) * (z[0][i] - mean);
#pragma unroll
    for (int m = 1; m < kMost; ++m)
        if (m < count) squares += (z[m][i] - mean) * (z[m][i] - mean);
    return ComputeF32::key(float(squares / Sum(count)));
}

// Where a block's results lie.
struct Place {
    int64_t row, label, rows, labels;
    __device__ bool inside(int i) const { return row + result_row(i) < rows && label + result_column(i) < labels; }
};

// First pass: counts the keys, and adds up z^2 in fixed point, which has the same sum in any order.
struct Select {
    int32_t lowest;
    int shift;
    const double* per_unit;  // 1 / unit of each expert
    Count *counts, *energies;

    static __device__ Count warp_sum(Count x) {
        for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_down_sync(kAllLanes, x, d);
        return x;
    }

    static __device__ void add(Count* to, Count mine) {
        const Count sum = warp_sum(mine);
        if (threadIdx.x % kWarp == 0 && sum) atomicAdd(to, sum);
    }

    template <int kMost, class Sum>
    __device__ void operator()(const Sum (&z)[kMost][kResults], int count, const Place& place) const {
        int bins[kResults];  // -1: not counted; kBins: beyond the window
        bool spread[kResults];
        Count zeros = 0, beyond = 0, mixed = 0;
#pragma unroll
        for (int i = 0; i < kResults; ++i) {
            const int32_t key = variance_key(z, i, count);
            const int32_t above = key - lowest, bin = above >> shift;
            bins[i] = !place.inside(i) || above < 0 ? -1 : bin < kBins ? bin : int(kBins);
            const bool inside = bins[i] >= 0 && bins[i] < kBins;
            // Of a single expert, or of equal ones, every variance is 0: one addition for all of them, not one each.
            spread[i] = inside && key != 0;
            zeros += inside && key == 0;
            beyond += bins[i] == kBins;
            mixed += inside && above != bin << shift;
            if (spread[i]) atomicAdd(counts + bin, Count(1));
        }
        add(counts, zeros);
        add(counts + kBins, beyond);
        add(counts + kBins + 1, mixed);
#pragma unroll
        for (int m = 0; m < kMost; ++m) {
            if (m >= count) break;
            Count *row = energies + m * (kBins + 1), at_zero = 0, past = 0;
            const double factor = per_unit[m];
#pragma unroll
            for (int i = 0; i < kResults; ++i) {
                const double x = double(z[m][i]);
                const Count energy = Count((long long)(x * x * factor + 0.5));
                if (spread[i])
                    atomicAdd(row + bins[i], energy);
                else if (bins[i] == kBins)
                    past += energy;
                else if (bins[i] >= 0)
                    at_zero += energy;
            }
            add(row, at_zero);
            add(row + kBins, past);
        }
    }
};

// Second pass: the weighted mean of the experts that have the elected sign, where the variance is large enough.
struct Combine {
    int32_t threshold;
    PerTensor<double> etas;
    Output combined;
    int64_t pitch;

    template <int kMost, class Sum>
    __device__ void operator()(const Sum (&z)[kMost][kResults], int count, const Place& place) const {
#pragma unroll
        for (int i = 0; i < kResults; ++i) {
            Sum total = z[0][i];
#pragma unroll
            for (int m = 1; m < kMost; ++m)
                if (m < count) total += z[m][i];
            Sum above = 0, below = 0;
#pragma unroll
            for (int m = 0; m < kMost; ++m)
                if (m < count && (total >= 0 ? z[m][i] > 0 : z[m][i] < 0)) {
                    above += Sum(etas[m]) * z[m][i];
                    below += Sum(etas[m]);
                }
            const bool keep = variance_key(z, i, count) >= threshold && below != 0;
            const int64_t at = (place.row + result_row(i)) * pitch + place.label + result_column(i);
            if (place.inside(i)) store_entry(combined, at, keep ? above / below : Sum(0));
        }
    }
};

// z_m = (in[m] - in[0]) bases^T of 64 rows (blockIdx.y) and 64 labels (blockIdx.x), for all experts at once: the base
// model and the bases are read once for all of them.
template <class P, int kMost, class Finish>
__global__ void __launch_bounds__(kProductThreads)
    coordinates_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Matrix model,
                       const __grid_constant__ Matrix bases, const __grid_constant__ Finish finish) {
    using Word = typename P::Word;
    SEME_DYNAMIC_SHARED(uint4, memory);
    Word* tiles = reinterpret_cast<Word*>(memory);
    const int count = in.count - 1;
    const Place place = {blockIdx.y * int64_t(kSide), blockIdx.x * int64_t(kSide), model.rows, bases.rows};
    typename P::Sum z[kMost][kResults] = {};
    for (int64_t inner = 0; inner < model.columns; inner += P::kInner) {
        for_groups<P>([&](int line, int i) {
            typename P::Sum base[kVector], x[kVector];
            Matrix expert = model;
            expert.data = in[0];
            load_entries<typename P::C>(expert, place.row + line, inner + i, base);
            for (int m = 1; m <= count; ++m) {
                expert.data = in[m];
                load_entries<typename P::C>(expert, place.row + line, inner + i, x);
                for (int j = 0; j < kVector; ++j) x[j] -= base[j];
                put<P>(tiles + (m - 1) * kTileWords<P>, line, i, x);
            }
        });
        bring<P>(bases, place.label, inner, tiles + count * kTileWords<P>);
        __syncthreads();
        P::multiply(tiles, count, z);
        __syncthreads();
    }
    finish(z, count, place);
}

template <class P, class Finish>
void run_coordinates(const std::vector<View>& tensors, const Matrix& model, const Matrix& bases, const Finish& finish,
                     cudaStream_t stream) {
    Inputs in = inputs_of(tensors);
    for (int i = 0; i < in.count; ++i) in.v[i].aligned = matrix_of(tensors[i], 0, 0, model.pitch).data.aligned;
    auto kernel =
        in.count - 1 <= kFew ? coordinates_kernel<P, kFew, Finish> : coordinates_kernel<P, kMaxExperts, Finish>;
    const int bytes = in.count * kTileWords<P> * int(sizeof(typename P::Word));
    allow_shared(kernel, bytes);
    const dim3 grid(ceil_div(bases.rows, kSide), ceil_div(model.rows, kSide));
    launch(kernel, grid, kProductThreads, bytes, stream, in, model, bases, finish);
}

template <class Finish>
void choose_coordinates(const std::vector<View>& tensors, const View& bases, Shape shape, bool wide,
                        const Finish& finish, cudaStream_t stream) {
    const Matrix model = matrix_of(tensors[0], shape.rows, shape.columns);
    const Matrix s = matrix_of(bases, shape.labels, shape.columns);
    if (wide)
        run_coordinates<Float64>(tensors, model, s, finish, stream);
    else if (is_bf16(tensors))
        run_coordinates<TensorCores>(tensors, model, s, finish, stream);
    else
        run_coordinates<Float32>(tensors, model, s, finish, stream);
}

// out = base + scale * combined dual, 64 rows (blockIdx.y) and 64 columns (blockIdx.x).
template <class P>
__global__ void __launch_bounds__(kProductThreads)
    recompose_kernel(const __grid_constant__ Matrix base, const __grid_constant__ Matrix combined,
                     const __grid_constant__ Matrix dual, typename P::Sum scale, Output out) {
    using Word = typename P::Word;
    SEME_DYNAMIC_SHARED(uint4, memory);
    Word* tiles = reinterpret_cast<Word*>(memory);
    const int64_t row = blockIdx.y * int64_t(kSide), column = blockIdx.x * int64_t(kSide);
    typename P::Sum sums[1][kResults] = {};
    for (int64_t inner = 0; inner < dual.rows; inner += P::kInner) {
        bring<P>(combined, row, inner, tiles);
        bring_transposed<P>(dual, column, inner, tiles + kTileWords<P>);
        __syncthreads();
        P::multiply(tiles, 1, sums);
        __syncthreads();
    }
    for (int i = 0; i < kResults; ++i) {
        const int64_t r = row + result_row(i), c = column + result_column(i), at = r * base.columns + c;
        if (r < base.rows && c < base.columns)
            store_entry(out, at, load_entry<typename P::C>(base.data, at) + scale * sums[0][i]);
    }
}

template <class P>
void run_recompose(const Matrix& base, const Matrix& combined, const Matrix& dual, double scale, const View& out,
                   cudaStream_t stream) {
    const int bytes = 2 * kTileWords<P> * int(sizeof(typename P::Word));
    const dim3 grid(ceil_div(base.columns, kSide), ceil_div(base.rows, kSide));
    launch(recompose_kernel<P>, grid, kProductThreads, bytes, stream, base, combined, dual, typename P::Sum(scale),
           output_of(out));
}

// norms[i - 1, row] = squared norm of a row (blockIdx.x) of in[i] - in[0]; i - 1 is blockIdx.y.
__global__ void __launch_bounds__(kThreads)
    squared_norms_kernel(const __grid_constant__ Inputs in, double* norms, int64_t rows, int64_t columns) {
    __shared__ double sums[kThreads / kWarp];
    double sum = 0;
    for (int64_t c = threadIdx.x; c < columns; c += kThreads) {
        const int64_t at = blockIdx.x * columns + c;
        const double t = load_entry<ComputeF64>(in[blockIdx.y + 1], at) - load_entry<ComputeF64>(in[0], at);
        sum += t * t;
    }
    for (int d = kWarp / 2; d > 0; d /= 2) sum += __shfl_down_sync(kAllLanes, sum, d);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < kThreads / kWarp; ++w) sum += sums[w];
    norms[blockIdx.y * rows + blockIdx.x] = sum;
}

}  // namespace

void squared_norms(const std::vector<View>& tensors, Shape shape, double* norms, Stream stream) {
    if (shape.rows > 0 && tensors.size() > 1)
        launch(squared_norms_kernel, dim3(unsigned(shape.rows), unsigned(tensors.size() - 1)), kThreads, 0, use(stream),
               inputs_of(tensors), norms, shape.rows, shape.columns);
}

void elect_select(const std::vector<View>& tensors, const View& bases, Shape shape, int64_t lowest, int shift,
                  const double* per_unit, int64_t* counts, int64_t* energies, Stream stream) {
    if (shape.rows == 0 || shape.labels == 0) return;
    const Select select = {int32_t(lowest), shift, per_unit, reinterpret_cast<Count*>(counts),
                           reinterpret_cast<Count*>(energies)};
    choose_coordinates(tensors, bases, shape, is_double(tensors) || is_double({bases}), select, use(stream));
}

void elect_combine(const std::vector<View>& tensors, const View& bases, Shape shape, int64_t threshold,
                   const std::vector<double>& etas, const View& combined, int64_t pitch, Stream stream) {
    if (shape.rows == 0 || shape.labels == 0) return;
    const Combine combine = {int32_t(threshold), per_tensor<double>(etas), output_of(combined), pitch};
    choose_coordinates(tensors, bases, shape, combined.dtype == DType::F64, combine, use(stream));
}

void elect_recompose(const View& base, const View& combined, int64_t pitch, const View& dual, Shape shape, double scale,
                     View out, Stream stream) {
    if (shape.rows == 0 || shape.columns == 0) return;
    const Matrix b = matrix_of(base, shape.rows, shape.columns);
    const Matrix c = matrix_of(combined, shape.rows, shape.labels, pitch);
    const Matrix d = matrix_of(dual, shape.labels, shape.columns);
    if (combined.dtype == DType::F64)
        run_recompose<Float64>(b, c, d, scale, out, use(stream));
    else if (combined.dtype == DType::BF16)
        run_recompose<TensorCores>(b, c, d, scale, out, use(stream));
    else
        run_recompose<Float32>(b, c, d, scale, out, use(stream));
}

}  // namespace seme::cuda
