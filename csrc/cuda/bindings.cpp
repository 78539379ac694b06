// The module seme._C_cuda. Tensors arrive as (device address, elements, dtype code); every size is checked again
// here, because past this file there are only pointers. `stream` is (device, address of the stream).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cuda.h"

namespace py = pybind11;
using seme::DType;
using seme::View;
using seme::cuda::Kept;

using PyView = std::tuple<uintptr_t, int64_t, int>;
using PyStream = std::pair<int, uintptr_t>;

static DType dtype_of(int code) {
    if (code < 0 || code > 3) throw std::invalid_argument("dtype code " + std::to_string(code) + " is not 0..3");
    return DType(code);
}

static void* memory(uintptr_t address, int64_t n) {
    if (n < 0) throw std::invalid_argument("negative element count");
    if (n > 0 && address == 0) throw std::invalid_argument("null address");
    return reinterpret_cast<void*>(address);
}

static View view_of(const PyView& v) {
    auto [address, n, code] = v;
    return {memory(address, n), n, dtype_of(code)};
}

static std::vector<View> views_of(const std::vector<PyView>& vs) {
    std::vector<View> views;
    for (const auto& v : vs) {
        views.push_back(view_of(v));
        if (views.back().n != views[0].n) throw std::invalid_argument("tensors differ in size");
    }
    if (views.empty()) throw std::invalid_argument("no tensors");
    if (views.size() > size_t(seme::cuda::kMaxTensors))
        throw std::invalid_argument("the CUDA kernels take at most " + std::to_string(seme::cuda::kMaxTensors) +
                                    " tensors, got " + std::to_string(views.size()) + "; use the backend triton");
    return views;
}

static void check_count(int64_t found, int64_t expected, const char* what) {
    if (found != expected)
        throw std::invalid_argument(std::string(what) + ": " + std::to_string(expected) + " expected, got " +
                                    std::to_string(found));
}

// int64 and float64 results and scratch come as (address, elements, -1 or code): only the first two are used.
template <class T>
static T* numbers(const PyView& v, int64_t expected, const char* what) {
    check_count(std::get<1>(v), expected, what);
    return static_cast<T*>(memory(std::get<0>(v), expected));
}

static seme::cuda::Stream stream_of(const PyStream& s) { return {s.first, s.second}; }

static int64_t count_blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

// One or two of each task vector.
static int64_t check_thresholds(const std::vector<int64_t>& thresholds, int64_t tensors) {
    const int64_t n = int64_t(thresholds.size());
    if (n != 2 * tensors) check_count(n, tensors, "thresholds");
    return n;
}

using Integers = std::vector<int64_t>;
// thresholds, quotas, chances, seeds, offset
using PySelection = std::tuple<Integers, Integers, Integers, Integers, int64_t>;

static Kept kept_of(const PySelection& selection, const std::optional<PyView>& tie_ends, int64_t tensors,
                    int64_t blocks) {
    const auto& [thresholds, quotas, chances, seeds, offset] = selection;
    const int64_t n = thresholds.empty() ? 0 : check_thresholds(thresholds, tensors);
    check_count(int64_t(quotas.size()), n, "tie_quotas");
    if (!chances.empty()) check_count(int64_t(chances.size()), tensors, "chances");
    check_count(int64_t(seeds.size()), int64_t(chances.size()), "seeds");
    if (offset < 0) throw std::invalid_argument("offset is negative");
    // Not within the braces: where that throws, GCC 12 destroys the vectors before it twice.
    const int64_t* ends = tie_ends ? numbers<const int64_t>(*tie_ends, n * blocks, "tie_ends") : nullptr;
    return {{thresholds, quotas, chances, seeds, offset}, ends};
}

static void weighted_sum(const std::vector<PyView>& tensors, const std::vector<double>& weights, double divisor,
                         int compute, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    View o = view_of(out);
    check_count(o.n, t[0].n, "elements of out");
    check_count(int64_t(weights.size()), int64_t(t.size()), "weights");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::weighted_sum(t, weights, divisor, c, o, stream_of(stream));
}

static void task_vector_sum(const std::vector<PyView>& tensors, const std::vector<double>& weights,
                            const std::vector<double>& factors, const PySelection& selection,
                            const std::optional<PyView>& tie_ends, double divisor, double scale, int compute,
                            const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    View o = view_of(out);
    const int64_t n = int64_t(t.size()) - 1;
    check_count(o.n, t[0].n, "elements of out");
    check_count(int64_t(weights.size()), n, "weights");
    check_count(int64_t(factors.size()), n, "factors");
    auto kept = kept_of(selection, tie_ends, n, count_blocks(o.n, seme::cuda::kTile));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::task_vector_sum(t, weights, factors, kept, divisor, scale, c, o, stream_of(stream));
}

static void inner_products(const std::vector<PyView>& tensors, int compute, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    const int64_t n = int64_t(t.size());
    auto* o = numbers<double>(out, seme::blocks(t[0].n) * n * n, "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::inner_products(t, c, o, stream_of(stream));
}

static void magnitude_histogram(const std::vector<PyView>& tensors, const std::vector<int64_t>& lowest,
                                const std::vector<int>& shift, int compute, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    const int64_t n = int64_t(t.size()) - 1;
    check_count(int64_t(lowest.size()), n, "lowest");
    check_count(int64_t(shift.size()), n, "shift");
    for (int64_t i = 0; i < n; ++i)
        if (lowest[i] < 0 || shift[i] < 0 || shift[i] > 47)
            throw std::invalid_argument("lowest >= 0 and shift 0..47 expected");
    auto* o = numbers<int64_t>(out, n * 65538, "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::magnitude_histogram(t, lowest, shift, c, o, stream_of(stream));
}

static void block_ties(const std::vector<PyView>& tensors, const std::vector<int64_t>& thresholds, int compute,
                       int64_t block, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    if (block != seme::cuda::kTile && block != seme::kBlock) throw std::invalid_argument("block is TILE or BLOCK");
    const int64_t n = check_thresholds(thresholds, int64_t(t.size()) - 1);
    auto* o = numbers<int64_t>(out, n * count_blocks(t[0].n, block), "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::block_ties(t, thresholds, c, block, o, stream_of(stream));
}

static void ties(const std::vector<PyView>& tensors, const std::vector<double>& weights,
                 const std::vector<double>& factors, const PySelection& selection,
                 const std::optional<PyView>& tie_ends, bool normalize, double scale, int compute, const PyView& out,
                 const PyStream& stream) {
    auto t = views_of(tensors);
    View o = view_of(out);
    const int64_t n = int64_t(t.size()) - 1;
    check_count(o.n, t[0].n, "elements of out");
    check_count(int64_t(weights.size()), n, "weights");
    check_count(int64_t(factors.size()), n, "factors");
    auto kept = kept_of(selection, tie_ends, n, count_blocks(o.n, seme::cuda::kTile));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::ties(t, weights, factors, kept, normalize, scale, c, o, stream_of(stream));
}

static void trimmed_l1(const std::vector<PyView>& tensors, const PySelection& selection,
                       const std::optional<PyView>& tie_ends, int compute, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    const int64_t n = int64_t(t.size()) - 1, blocks = seme::blocks(t[0].n);
    auto kept = kept_of(selection, tie_ends, n, blocks);
    auto* o = numbers<double>(out, blocks * n * 2, "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::trimmed_l1(t, kept, c, o, stream_of(stream));
}

// row, columns, offset: see ../weights.h
using PyPlace = std::tuple<int64_t, int64_t, int64_t>;

// Weights of `count` tensors of n elements: in `weights`, or with rows or columns in `table`, on the device.
static seme::Weights sets_of(const std::vector<double>& weights, const std::optional<PyView>& table,
                             const PyPlace& place, int64_t count, int64_t n) {
    auto [row, columns, offset] = place;
    if (row < 0 || columns < 0 || offset < 0 || (row > 0 && columns > 0)) throw std::invalid_argument("no such rows");
    if (row > 0 && n % row != 0) throw std::invalid_argument("not whole rows");
    if (table.has_value() != (row > 0 || columns > 0)) throw std::invalid_argument("a table is for rows or columns");
    check_count(int64_t(weights.size()), table ? 0 : count, "weights");
    const int64_t sets = row > 0 ? n / row : columns;
    return {table ? numbers<const double>(*table, count * sets, "elements of the table") : nullptr, count, row, columns,
            offset};
}

static void line_products(const std::vector<PyView>& tensors, bool relative, int64_t block, int64_t columns,
                          int compute, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    const int64_t n = int64_t(t.size()) - relative;
    if (n < 1) throw std::invalid_argument("no tensors");
    if (block < 1 || columns < 0 || (columns > 0 && (block % columns != 0 || t[0].n % columns != 0)))
        throw std::invalid_argument("not whole rows");
    const int64_t each = n * n * (columns > 0 ? columns : 1);
    auto* o = numbers<double>(out, count_blocks(t[0].n, block) * each, "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::line_products(t, relative, block, columns, c, o, stream_of(stream));
}

static void nearswap(const std::vector<PyView>& tensors, double t, double least, int compute, const PyView& out,
                     const PyStream& stream) {
    auto views = views_of(tensors);
    View o = view_of(out);
    check_count(int64_t(views.size()), 2, "tensors");
    check_count(o.n, views[0].n, "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::nearswap(views, t, least, c, o, stream_of(stream));
}

static void line_sum(const std::vector<PyView>& tensors, bool relative, const std::vector<double>& weights,
                     const std::optional<PyView>& table, const PyPlace& place, int compute, const PyView& out,
                     const PyStream& stream) {
    auto t = views_of(tensors);
    View o = view_of(out);
    check_count(o.n, t[0].n, "elements of out");
    auto sets = sets_of(weights, table, place, int64_t(t.size()) - relative, o.n);
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::line_sum(t, relative, weights, sets, c, o, stream_of(stream));
}

// Selection by the variance over the task vectors: one threshold for all of them.

static void check_experts(const std::vector<View>& tensors) {
    if (tensors.size() < 2) throw std::invalid_argument("no task vectors");
}

static void variance_histogram(const std::vector<PyView>& tensors, int64_t lowest, int shift, int compute,
                               const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    check_experts(t);
    if (lowest < 0 || shift < 0 || shift > 47) throw std::invalid_argument("lowest >= 0 and shift 0..47 expected");
    auto* o = numbers<int64_t>(out, 65538, "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::variance_histogram(t, lowest, shift, c, o, stream_of(stream));
}

static void variance_ties(const std::vector<PyView>& tensors, int64_t threshold, int compute, int64_t block,
                          const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    check_experts(t);
    if (block != seme::cuda::kTile && block != seme::kBlock) throw std::invalid_argument("block is TILE or BLOCK");
    auto* o = numbers<int64_t>(out, count_blocks(t[0].n, block), "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::variance_ties(t, threshold, c, block, o, stream_of(stream));
}

static void selected_squares(const std::vector<PyView>& tensors, const std::vector<int64_t>& thresholds,
                             const std::vector<int64_t>& tie_quotas, const std::optional<PyView>& tie_ends, int compute,
                             const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    check_experts(t);
    const int64_t blocks = seme::blocks(t[0].n);
    auto s = kept_of({thresholds, tie_quotas, {}, {}, 0}, tie_ends, 1, blocks);
    auto* o = numbers<double>(out, blocks * int64_t(t.size() - 1), "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::selected_squares(t, s, c, o, stream_of(stream));
}

static void sce(const std::vector<PyView>& tensors, const std::vector<double>& coefficients,
                const std::vector<int64_t>& thresholds, const std::vector<int64_t>& tie_quotas,
                const std::optional<PyView>& tie_ends, int compute, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    View o = view_of(out);
    check_experts(t);
    check_count(o.n, t[0].n, "elements of out");
    check_count(int64_t(coefficients.size()), int64_t(t.size()) - 1, "coefficients");
    auto s = kept_of({thresholds, tie_quotas, {}, {}, 0}, tie_ends, 1, count_blocks(o.n, seme::cuda::kTile));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::sce(t, coefficients, s, c, o, stream_of(stream));
}

static void ram(const std::vector<PyView>& tensors, const std::vector<double>& scales, double epsilon, bool rounded,
                int compute, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    View o = view_of(out);
    check_experts(t);
    check_count(o.n, t[0].n, "elements of out");
    check_count(int64_t(scales.size()), int64_t(t.size()) - 1, "scales");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::ram(t, scales, epsilon, rounded, c, o, stream_of(stream));
}

static void overlap_counts(const std::vector<PyView>& tensors, double epsilon, int compute, const PyView& out,
                           const PyStream& stream) {
    auto t = views_of(tensors);
    check_experts(t);
    auto* o = numbers<int64_t>(out, int64_t(t.size() - 1) * 2, "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::overlap_counts(t, epsilon, c, o, stream_of(stream));
}

// The rows of a base and one other tensor.
static int64_t rows_of(const std::vector<View>& tensors, int64_t row) {
    if (tensors.size() != 2) throw std::invalid_argument("a base and one tensor expected");
    if (row < 1 || tensors[0].n % row != 0) throw std::invalid_argument("no whole rows");
    return tensors[0].n / row;
}

static void row_divergence(const std::vector<PyView>& tensors, int64_t row, bool rounded, int compute,
                           const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    auto* o = numbers<double>(out, rows_of(t, row), "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::row_divergence(t, row, rounded, c, o, stream_of(stream));
}

static void importance_histogram(const std::vector<PyView>& tensors, const PyView& factors, int64_t row,
                                 const std::vector<int64_t>& lowest, const std::vector<int>& shift, int compute,
                                 const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    auto* f = numbers<const double>(factors, rows_of(t, row), "factors");
    const int64_t windows = int64_t(lowest.size());
    check_count(int64_t(shift.size()), windows, "shift");
    if (windows > seme::cuda::kMaxTensors) throw std::invalid_argument("too many windows");
    for (int64_t i = 0; i < windows; ++i)
        if (lowest[i] < 0 || shift[i] < 0 || shift[i] > 47)
            throw std::invalid_argument("lowest >= 0 and shift 0..47 expected");
    auto* o = numbers<int64_t>(out, windows * 65538, "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::importance_histogram(t, f, row, lowest, shift, c, o, stream_of(stream));
}

static void importance_fusion(const std::vector<PyView>& tensors, const PyView& factors, int64_t row, double threshold,
                              int compute, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    View o = view_of(out);
    auto* f = numbers<const double>(factors, rows_of(t, row), "factors");
    check_count(o.n, t[0].n, "elements of out");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cuda::importance_fusion(t, f, row, threshold, c, o, stream_of(stream));
}

// The rows, columns and labels of a matrix op.
static seme::cuda::Shape shape_of(const std::tuple<int64_t, int64_t, int64_t>& sizes) {
    auto [rows, columns, labels] = sizes;
    if (rows < 0 || columns < 0 || labels < 0) throw std::invalid_argument("negative size");
    return {rows, columns, labels};
}

using PyShape = std::tuple<int64_t, int64_t, int64_t>;

static View matrix_view(const PyView& v, int64_t rows, int64_t columns, const char* what) {
    View view = view_of(v);
    check_count(view.n, rows * columns, what);
    return view;
}

static std::vector<View> experts_of(const std::vector<PyView>& tensors, const seme::cuda::Shape& shape) {
    auto t = views_of(tensors);
    check_count(t[0].n, shape.rows * shape.columns, "elements of a tensor");
    if (t.size() < 2) throw std::invalid_argument("no experts");
    if (t.size() - 1 > size_t(seme::cuda::kMaxExperts))
        throw std::invalid_argument("the CUDA kernels of elect take at most " +
                                    std::to_string(seme::cuda::kMaxExperts) + " experts, got " +
                                    std::to_string(t.size() - 1) + "; use the backend triton");
    return t;
}

static void check_k(int k, const seme::cuda::Shape& shape) {
    if (k < 1 || k > 64 || k > shape.labels) throw std::invalid_argument("k is 1 to 64, and at most the labels");
}

static void squared_norms(const std::vector<PyView>& tensors, const PyShape& sizes, const PyView& norms,
                          const PyStream& stream) {
    auto shape = shape_of(sizes);
    auto t = experts_of(tensors, shape);
    auto* o = numbers<double>(norms, int64_t(t.size() - 1) * shape.rows, "elements of norms");
    py::gil_scoped_release release;
    seme::cuda::squared_norms(t, shape, o, stream_of(stream));
}

static void elect_select(const std::vector<PyView>& tensors, const PyView& bases, const PyShape& sizes, int64_t lowest,
                         int shift, const PyView& per_unit, const PyView& counts, const PyView& energies,
                         const PyStream& stream) {
    auto shape = shape_of(sizes);
    auto t = experts_of(tensors, shape);
    const int64_t n = int64_t(t.size()) - 1;
    View s = matrix_view(bases, shape.labels, shape.columns, "elements of bases");
    if (lowest < 0 || lowest > 0x7FFFFFFF || shift < 0 || shift > 15)
        throw std::invalid_argument("lowest 0..2^31-1 and shift 0..15 expected");
    auto* units = numbers<const double>(per_unit, n, "elements of per_unit");
    auto* c = numbers<int64_t>(counts, 65538, "elements of counts");
    auto* e = numbers<int64_t>(energies, n * 65537, "elements of energies");
    py::gil_scoped_release release;
    seme::cuda::elect_select(t, s, shape, lowest, shift, units, c, e, stream_of(stream));
}

static void elect_combine(const std::vector<PyView>& tensors, const PyView& bases, const PyShape& sizes,
                          int64_t threshold, const std::vector<double>& etas, const PyView& combined, int64_t pitch,
                          const PyStream& stream) {
    auto shape = shape_of(sizes);
    auto t = experts_of(tensors, shape);
    View s = matrix_view(bases, shape.labels, shape.columns, "elements of bases");
    View c = matrix_view(combined, shape.rows, pitch, "elements of combined");
    check_count(int64_t(etas.size()), int64_t(t.size()) - 1, "etas");
    if (pitch < shape.labels) throw std::invalid_argument("pitch is smaller than the number of labels");
    if (threshold < 0 || threshold > 0x7FFFFFFF) throw std::invalid_argument("threshold 0..2^31-1 expected");
    py::gil_scoped_release release;
    seme::cuda::elect_combine(t, s, shape, threshold, etas, c, pitch, stream_of(stream));
}

static void elect_recompose(const PyView& base, const PyView& combined, int64_t pitch, const PyView& dual,
                            const PyShape& sizes, double scale, const PyView& out, const PyStream& stream) {
    auto shape = shape_of(sizes);
    View b = matrix_view(base, shape.rows, shape.columns, "elements of base");
    View c = matrix_view(combined, shape.rows, pitch, "elements of combined");
    View d = matrix_view(dual, shape.labels, shape.columns, "elements of dual");
    View o = matrix_view(out, shape.rows, shape.columns, "elements of out");
    if (pitch < shape.labels) throw std::invalid_argument("pitch is smaller than the number of labels");
    py::gil_scoped_release release;
    seme::cuda::elect_recompose(b, c, pitch, d, shape, scale, o, stream_of(stream));
}

static void resolve_select(const PyView& vectors, const PyView& bases, const PyShape& sizes, int k, int64_t ranges,
                           const PyView& best, const PyStream& stream) {
    auto shape = shape_of(sizes);
    check_k(k, shape);
    View h = matrix_view(vectors, shape.rows, shape.columns, "elements of vectors");
    View s = matrix_view(bases, shape.labels, shape.columns, "elements of bases");
    if (ranges < 1 || ranges > 65535) throw std::invalid_argument("ranges 1..65535 expected");
    if (shape.labels >= int64_t(0xFFFFFFFF)) throw std::invalid_argument("fewer than 2^32 - 1 labels expected");
    auto* o = numbers<int64_t>(best, shape.rows * ranges * k, "elements of best");
    py::gil_scoped_release release;
    seme::cuda::resolve_select(h, s, shape, k, ranges, o, stream_of(stream));
}

static void resolve_erase(const PyView& vectors, const PyView& bases, const PyShape& sizes, const PyView& labels, int k,
                          double dependent, const PyView& coefficients, const PyView& residual,
                          const PyStream& stream) {
    auto shape = shape_of(sizes);
    check_k(k, shape);
    View h = matrix_view(vectors, shape.rows, shape.columns, "elements of vectors");
    View s = matrix_view(bases, shape.labels, shape.columns, "elements of bases");
    auto* l = numbers<const int64_t>(labels, shape.rows * k, "elements of labels");
    View c = matrix_view(coefficients, shape.rows, k, "elements of coefficients");
    View r = matrix_view(residual, shape.rows, shape.columns, "elements of residual");
    py::gil_scoped_release release;
    seme::cuda::resolve_erase(h, s, shape, l, k, dependent, c, r, stream_of(stream));
}

static void nonfinite(const std::vector<PyView>& tensors, const PyView& out, const PyStream& stream) {
    auto t = views_of(tensors);
    auto* o = numbers<int64_t>(out, int64_t(t.size()), "elements of out");
    py::gil_scoped_release release;
    seme::cuda::nonfinite(t, o, stream_of(stream));
}

PYBIND11_MODULE(_C_cuda, m) {
    m.doc() = "CUDA kernels of seme";
    m.attr("BLOCK") = seme::kBlock;
    m.attr("TILE") = seme::cuda::kTile;
    m.attr("MAX_TENSORS") = seme::cuda::kMaxTensors;
    m.attr("MAX_EXPERTS") = seme::cuda::kMaxExperts;
    m.def("weighted_sum", &weighted_sum);
    m.def("task_vector_sum", &task_vector_sum);
    m.def("inner_products", &inner_products);
    m.def("magnitude_histogram", &magnitude_histogram);
    m.def("block_ties", &block_ties);
    m.def("ties", &ties);
    m.def("trimmed_l1", &trimmed_l1);
    m.def("line_products", &line_products);
    m.def("line_sum", &line_sum);
    m.def("nearswap", &nearswap);
    m.def("variance_histogram", &variance_histogram);
    m.def("variance_ties", &variance_ties);
    m.def("selected_squares", &selected_squares);
    m.def("sce", &sce);
    m.def("ram", &ram);
    m.def("overlap_counts", &overlap_counts);
    m.def("row_divergence", &row_divergence);
    m.def("importance_histogram", &importance_histogram);
    m.def("importance_fusion", &importance_fusion);
    m.def("nonfinite", &nonfinite);
    m.def("squared_norms", &squared_norms);
    m.def("elect_select", &elect_select);
    m.def("elect_combine", &elect_combine);
    m.def("elect_recompose", &elect_recompose);
    m.def("resolve_select", &resolve_select);
    m.def("resolve_erase", &resolve_erase);
}
