#include "matrix.cuh"

namespace seme::cuda {
namespace {

using Candidate = unsigned long long;  // key of a score's magnitude, then the complement of its label; 0: none
constexpr int kList = 64;              // candidates that are held per vector
constexpr int kEraseThreads = 128;
constexpr int kEraseInner = 32;

// The list of one vector, in descending order, in the registers of a warp: entries `lane` and `lane + 32`.
struct List {
    Candidate first, second;

    __device__ Candidate at(int i) const {
        const Candidate a = __shfl_sync(kAllLanes, first, i % kWarp), b = __shfl_sync(kAllLanes, second, i % kWarp);
        return i < kWarp ? a : b;
    }

    // Called by the whole warp with the same c.
    __device__ void insert(Candidate c) {
        const int lane = threadIdx.x % kWarp;
        const int place = __popc(__ballot_sync(kAllLanes, first > c)) + __popc(__ballot_sync(kAllLanes, second > c));
        const Candidate last = __shfl_sync(kAllLanes, first, kWarp - 1);
        const Candidate a = __shfl_up_sync(kAllLanes, first, 1), b = __shfl_up_sync(kAllLanes, second, 1);
        const Candidate before = lane == 0 ? last : b;
        first = lane < place ? first : lane == place ? c : a;
        second = lane + kWarp < place ? second : lane + kWarp == place ? c : before;
    }
};

// The k best candidates of 64 vectors (blockIdx.x) in one range of label tiles (blockIdx.y): best[row, range, k].
template <class P>
__global__ void __launch_bounds__(kProductThreads)
    resolve_select_kernel(const __grid_constant__ Matrix vectors, const __grid_constant__ Matrix bases, int k,
                          Candidate* best) {
    using Word = typename P::Word;
    SEME_DYNAMIC_SHARED(uint4, memory);
    Candidate* lists = reinterpret_cast<Candidate*>(memory);
    int32_t* keys = reinterpret_cast<int32_t*>(lists + kSide * kList);
    Word* tiles = reinterpret_cast<Word*>(keys + kSide * kSide);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t row = blockIdx.x * int64_t(kSide);
    const int64_t count = (bases.rows + kSide - 1) / kSide, per_range = (count + gridDim.y - 1) / gridDim.y;
    const int64_t begin = blockIdx.y * per_range, end = begin + per_range < count ? begin + per_range : count;
    for (int i = threadIdx.x; i < kSide * kList; i += kProductThreads) lists[i] = 0;
    for (int64_t label = begin * kSide; label < end * kSide; label += kSide) {
        typename P::Sum score[1][kResults] = {};
        for (int64_t inner = 0; inner < vectors.columns; inner += P::kInner) {
            bring<P>(vectors, row, inner, tiles);
            bring<P>(bases, label, inner, tiles + kTileWords<P>);
            __syncthreads();
            P::multiply(tiles, 1, score);
            __syncthreads();
        }
        for (int i = 0; i < kResults; ++i)
            keys[result_row(i) * kSide + result_column(i)] = ComputeF32::key(float(score[0][i]));
        __syncthreads();
        for (int line = warp; line < kSide; line += kProductThreads / kWarp) {
            if (row + line >= vectors.rows) break;  // the same for the whole warp
            Candidate mine[2];
            for (int h = 0; h < 2; ++h) {
                const int64_t l = label + lane + h * kWarp;
                const Candidate key = Candidate(uint32_t(keys[line * kSide + lane + h * kWarp]));
                mine[h] = l < bases.rows ? key << 32 | (0xFFFFFFFFu - uint32_t(l)) : 0;
            }
            List list = {lists[line * kList + lane], lists[line * kList + lane + kWarp]};
            for (int h = 0; h < 2; ++h) {
                Candidate worst = list.at(k - 1);
                for (;;) {
                    const unsigned better = __ballot_sync(kAllLanes, mine[h] > worst);
                    if (!better) break;
                    const int from = __popc((better & (0u - better)) - 1);  // the lowest lane of them
                    list.insert(__shfl_sync(kAllLanes, mine[h], from));
                    if (lane == from) mine[h] = 0;
                    worst = list.at(k - 1);
                }
            }
            lists[line * kList + lane] = list.first;
            lists[line * kList + lane + kWarp] = list.second;
        }
        __syncthreads();  // keys and tiles have been read
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kSide * k; i += kProductThreads) {
        const int line = i / k, place = i % k;
        if (row + line < vectors.rows)
            best[((row + line) * gridDim.y + blockIdx.y) * k + place] = lists[line * kList + place];
    }
}

template <class P>
void run_select(const Matrix& vectors, const Matrix& bases, int k, int64_t ranges, int64_t* best, cudaStream_t stream) {
    const int bytes = kSide * kList * int(sizeof(Candidate)) + kSide * kSide * int(sizeof(int32_t)) +
                      2 * kTileWords<P> * int(sizeof(typename P::Word));
    auto kernel = resolve_select_kernel<P>;
    allow_shared(kernel, bytes);
    const dim3 grid(ceil_div(vectors.rows, kSide), unsigned(ranges));
    launch(kernel, grid, kProductThreads, bytes, stream, vectors, bases, k, reinterpret_cast<Candidate*>(best));
}

// Least squares of one vector (blockIdx.x) on its k bases, through their Gram matrix, and what is left of the vector. A
// Gram matrix has the square of the condition of its bases, so it is formed and solved in float64.
__global__ void __launch_bounds__(kEraseThreads)
    resolve_erase_kernel(const __grid_constant__ Matrix vectors, const __grid_constant__ Matrix bases,
                         const int64_t* labels, int k, double dependent, Output coefficients, Output residual) {
    using C = ComputeF64;
    constexpr int kPitch = kEraseInner + 1;
    SEME_DYNAMIC_SHARED(uint4, memory);
    double* gram = reinterpret_cast<double*>(memory);  // [k, kList]
    double* s = gram + kList * kList;                  // [k, kPitch], then h, the tile of the vector
    double *h = s + k * kPitch, *right = s + kList * kPitch + kPitch, *least = right + kList;
    double *line = least + kList, *column = line + kList;
    const int64_t row = blockIdx.x, d = vectors.columns;
    const int64_t* own = labels + row * k;
    for (int p = threadIdx.x; p < k * k; p += kEraseThreads) gram[p / k * kList + p % k] = 0;
    for (int i = threadIdx.x; i < k; i += kEraseThreads) right[i] = 0;
    for (int64_t inner = 0; inner < d; inner += kEraseInner) {
        const int width = d - inner < kEraseInner ? int(d - inner) : kEraseInner;
        __syncthreads();  // the tile before has been read
        for (int p = threadIdx.x; p < k * width; p += kEraseThreads) {
            const int i = p / width, c = p % width;
            s[i * kPitch + c] = load_entry<C>(bases.data, own[i] * bases.pitch + inner + c);
        }
        for (int c = threadIdx.x; c < width; c += kEraseThreads)
            h[c] = load_entry<C>(vectors.data, row * vectors.pitch + inner + c);
        __syncthreads();
        for (int p = threadIdx.x; p < k * (k + 1); p += kEraseThreads) {
            const int i = p / (k + 1), j = p % (k + 1);  // row k of s is h
            double sum = 0;
            for (int c = 0; c < width; ++c) sum += s[i * kPitch + c] * s[j * kPitch + c];
            (j < k ? gram[i * kList + j] : right[i]) += sum;
        }
    }
    __syncthreads();

    // Elimination above and below the diagonal, in the order of the labels, so that the right-hand side becomes the
    // solution. A label that depends on those before it is passed over, and marked by its `least`.
    for (int i = threadIdx.x; i < k; i += kEraseThreads) least[i] = dependent * gram[i * kList + i];
    __syncthreads();
    for (int j = 0; j < k; ++j) {
        const double pivot = gram[j * kList + j], share = right[j] / pivot;
        const bool independent = pivot > least[j];
        for (int i = threadIdx.x; i < k; i += kEraseThreads) {
            line[i] = gram[j * kList + i] / pivot;
            column[i] = gram[i * kList + j];
        }
        __syncthreads();
        if (independent) {  // the same for the whole block
            for (int p = threadIdx.x; p < k * k; p += kEraseThreads) {
                const int i = p / k, c = p % k;
                double& entry = gram[i * kList + c];
                entry = i == j ? line[c] : entry - column[i] * line[c];
            }
            for (int i = threadIdx.x; i < k; i += kEraseThreads)
                right[i] = i == j ? share : right[i] - column[i] * share;
        } else if (threadIdx.x == 0) {
            least[j] = -1;
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < k; i += kEraseThreads) {
        if (least[i] < 0) right[i] = 0;
        store_entry(coefficients, row * k + i, right[i]);
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c < d; c += kEraseThreads) {
        double sum = 0;
        for (int i = 0; i < k; ++i) sum += right[i] * load_entry<C>(bases.data, own[i] * bases.pitch + c);
        store_entry(residual, row * d + c, load_entry<C>(vectors.data, row * vectors.pitch + c) - sum);
    }
}

}  // namespace

void resolve_select(const View& vectors, const View& bases, Shape shape, int k, int64_t ranges, int64_t* best,
                    Stream stream) {
    if (shape.rows == 0) return;
    const Matrix h = matrix_of(vectors, shape.rows, shape.columns);
    const Matrix s = matrix_of(bases, shape.labels, shape.columns);
    if (is_double({vectors, bases}))
        run_select<Float64>(h, s, k, ranges, best, use(stream));
    else if (is_bf16({vectors}))
        run_select<TensorCores>(h, s, k, ranges, best, use(stream));
    else
        run_select<Float32>(h, s, k, ranges, best, use(stream));
}

void resolve_erase(const View& vectors, const View& bases, Shape shape, const int64_t* labels, int k, double dependent,
                   const View& coefficients, const View& residual, Stream stream) {
    if (shape.rows == 0) return;
    const Matrix h = matrix_of(vectors, shape.rows, shape.columns);
    const Matrix s = matrix_of(bases, shape.labels, shape.columns);
    const int doubles = kList * kList + (kList + 1) * (kEraseInner + 1) + 4 * kList;
    const int bytes = doubles * int(sizeof(double));
    allow_shared(resolve_erase_kernel, bytes);
    launch(resolve_erase_kernel, dim3(unsigned(shape.rows)), kEraseThreads, bytes, use(stream), h, s, labels, k,
           dependent, output_of(coefficients), output_of(residual));
}

}  // namespace seme::cuda
