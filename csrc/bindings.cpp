// The module seme._C. Tensors arrive as (address, elements, dtype code); every size is checked again here,
// because past this file there are only pointers. The GIL is released around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "formulas.h"
#include "isa.h"
#include "weights.h"

namespace py = pybind11;
using seme::DType;
using seme::View;

using PyView = std::tuple<uintptr_t, int64_t, int>;

static DType dtype_of(int code) {
    if (code < 0 || code > 3) throw std::invalid_argument("dtype code " + std::to_string(code) + " is not 0..3");
    return DType(code);
}

static View view_of(const PyView& v) {
    auto [address, n, code] = v;
    if (n < 0) throw std::invalid_argument("negative element count");
    if (n > 0 && address == 0) throw std::invalid_argument("null address");
    return {reinterpret_cast<void*>(address), n, dtype_of(code)};
}

static std::vector<View> views_of(const std::vector<PyView>& vs, int64_t n) {
    std::vector<View> views;
    for (const auto& v : vs) {
        views.push_back(view_of(v));
        if (views.back().n != n) throw std::invalid_argument("tensors differ in size");
    }
    if (views.empty()) throw std::invalid_argument("no tensors");
    return views;
}

using PyMatrix = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int>;

// address, rows, columns, elements from row to row, dtype code
static seme::Matrix matrix_of(const PyMatrix& m) {
    auto [address, rows, cols, stride, code] = m;
    if (rows < 0 || cols < 0) throw std::invalid_argument("negative size");
    if (rows > 1 && stride < cols) throw std::invalid_argument("rows overlap");
    if (rows > 0 && cols > 0 && address == 0) throw std::invalid_argument("null address");
    return {reinterpret_cast<void*>(address), rows, cols, stride, dtype_of(code)};
}

static void check_equal(int64_t found, int64_t expected, const char* what) {
    if (found != expected)
        throw std::invalid_argument(std::string(what) + " is " + std::to_string(found) + ", expected " +
                                    std::to_string(expected));
}

static void check_shape(const seme::Matrix& m, int64_t rows, int64_t cols, const char* what) {
    check_equal(m.rows, rows, (std::string("rows of ") + what).c_str());
    check_equal(m.cols, cols, (std::string("columns of ") + what).c_str());
}

// A matrix of the working dtype of a matrix op.
static seme::Matrix working(const PyMatrix& m, DType dtype) {
    const seme::Matrix found = matrix_of(m);
    if (found.dtype != dtype || (dtype != DType::F32 && dtype != DType::F64))
        throw std::invalid_argument("working dtype expected");
    return found;
}

static DType dtype_of(const PyMatrix& m) { return dtype_of(std::get<4>(m)); }

static void check_count(size_t found, size_t expected, const char* what) {
    if (found != expected) throw std::invalid_argument(std::string(what) + ": one per tensor expected");
}

// The memory of `expected` int64 (T = int64_t, whose dtype has no code) or float64 results.
template <class T>
static T* results_of(const PyView& v, int64_t expected) {
    auto [address, n, code] = v;
    const int expected_code = std::is_same_v<T, double> ? int(DType::F64) : -1;
    if (code != expected_code) throw std::invalid_argument("out has the wrong dtype");
    if (n != expected)
        throw std::invalid_argument("out has " + std::to_string(n) + " elements, expected " + std::to_string(expected));
    if (n > 0 && address == 0) throw std::invalid_argument("null address");
    return reinterpret_cast<T*>(address);
}

static std::vector<View> views_of(const std::vector<PyView>& vs) {
    if (vs.empty()) throw std::invalid_argument("no tensors");
    return views_of(vs, std::get<1>(vs[0]));
}

using Reals = std::vector<double>;
using Integers = std::vector<int64_t>;

static void weighted_sum(const std::vector<PyView>& tensors, const Reals& weights, double divisor, int compute,
                         const PyView& out, int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    check_count(weights.size(), t.size(), "weights");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::weighted_sum(t, weights, divisor, c, o, threads);
}

static void inner_products(const std::vector<PyView>& tensors, int compute, const PyView& out, int threads) {
    auto t = views_of(tensors);
    double* o = results_of<double>(out, seme::blocks(t[0].n) * int64_t(t.size() * t.size()));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::inner_products(t, c, o, threads);
}

static void nonfinite(const std::vector<PyView>& tensors, const PyView& out, int threads, bool zero) {
    std::vector<View> t;
    for (const auto& v : tensors) t.push_back(view_of(v));  // sizes may differ
    int64_t* o = results_of<int64_t>(out, int64_t(t.size()));
    py::gil_scoped_release release;
    seme::cpu::nonfinite(t, zero, o, threads);
}

// Ops on task vectors: tensors[0] is the base, and the other arguments have one entry for each of the others.

// thresholds, quotas, chances, seeds, offset, spreads, row
using PySelection = std::tuple<Integers, Integers, Integers, Integers, int64_t, Integers, int64_t>;

// A selection from `count` task vectors of n elements.
static seme::Selection selection_of(const PySelection& s, size_t count, int64_t n) {
    const auto& [thresholds, quotas, chances, seeds, offset, spreads, row] = s;
    if (thresholds.size() != 2 * count && !thresholds.empty()) check_count(thresholds.size(), count, "thresholds");
    check_count(quotas.size(), thresholds.size(), "tie_quotas");
    if (!chances.empty()) check_count(chances.size(), count, "chances");
    check_count(seeds.size(), chances.size(), "seeds");
    if (offset < 0) throw std::invalid_argument("offset is negative");
    if (row < 0 || spreads.empty() != (row == 0)) throw std::invalid_argument("spreads and row go together");
    if (row > 0) {
        check_count(spreads.size(), chances.size(), "spreads");
        if (!thresholds.empty()) throw std::invalid_argument("spreads and thresholds exclude each other");
        if (row > int64_t(1) << 31 || n % row != 0) throw std::invalid_argument("not whole rows");
        for (size_t i = 0; i < count; ++i)
            if (spreads[i] < 0 || spreads[i] > int64_t(1) << 32) throw std::invalid_argument("spread is not 0 to 2^32");
    }
    return {thresholds, quotas, chances, seeds, offset, spreads, row};
}

static void task_vector_sum(const std::vector<PyView>& tensors, const Reals& weights, const Reals& factors,
                            const PySelection& selection, double divisor, double scale, int compute, const PyView& out,
                            int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    check_count(weights.size(), t.size() - 1, "weights");
    check_count(factors.size(), t.size() - 1, "factors");
    const auto s = selection_of(selection, t.size() - 1, t[0].n);
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::task_vector_sum(t, weights, factors, s, divisor, scale, c, o, threads);
}

static void magnitude_histogram(const std::vector<PyView>& tensors, const Integers& lowest, const Integers& shift,
                                int compute, const PyView& out, int threads) {
    auto t = views_of(tensors);
    check_count(lowest.size(), t.size() - 1, "lowest");
    check_count(shift.size(), t.size() - 1, "shift");
    for (int64_t v : lowest)
        if (v < 0) throw std::invalid_argument("lowest is negative");
    for (int64_t v : shift)
        if (v < 0 || v > 47) throw std::invalid_argument("shift is not 0..47");
    int64_t* o = results_of<int64_t>(out, int64_t(lowest.size()) * (seme::kBins + 2));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::magnitude_histogram(t, lowest, shift, c, o, threads);
}

// Scans `bins` counts from the top down. The first bin where the running sum reaches k, and the sum above it;
// (-1, the whole sum) if it never does.
static std::pair<int64_t, int64_t> find_in_histogram(uintptr_t address, int64_t bins, int64_t k) {
    if (bins < 0 || (bins > 0 && address == 0)) throw std::invalid_argument("no counts");
    const int64_t* counts = reinterpret_cast<const int64_t*>(address);
    int64_t above = 0;
    for (int64_t bin = bins - 1; bin >= 0; --bin) {
        if (above + counts[bin] >= k) return {bin, above};
        above += counts[bin];
    }
    return {-1, above};
}

static void add_int64(uintptr_t total, uintptr_t other, int64_t n) {
    if (n < 0 || (n > 0 && (total == 0 || other == 0))) throw std::invalid_argument("no memory to add");
    int64_t* to = reinterpret_cast<int64_t*>(total);
    const int64_t* from = reinterpret_cast<const int64_t*>(other);
    py::gil_scoped_release release;
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// (runs read, errno): all of them and 0, or those before the one that failed and why, 0 at the end of the file.
static std::pair<int64_t, int> read_runs(int file, int64_t n, uintptr_t offsets, uintptr_t places, uintptr_t sizes,
                                         uintptr_t to, int64_t capacity) {
    if (n < 0 || (n > 0 && (offsets == 0 || places == 0 || sizes == 0 || to == 0)))
        throw std::invalid_argument("no memory to read into");
    const auto *o = reinterpret_cast<const int64_t*>(offsets), *p = reinterpret_cast<const int64_t*>(places),
               *s = reinterpret_cast<const int64_t*>(sizes);
    py::gil_scoped_release release;
    for (int64_t i = 0; i < n; ++i)
        if (o[i] < 0 || s[i] < 0 || s[i] > capacity || p[i] < 0 || p[i] > capacity - s[i])
            throw std::invalid_argument("a run lies outside of the memory");
    try {
        seme::read_runs(file, n, o, p, s, reinterpret_cast<char*>(to));
    } catch (const seme::ReadError& e) {
        return {e.run, e.number};
    }
    return {n, 0};
}

static void tie_counts(const std::vector<PyView>& tensors, const Integers& thresholds, int compute, const PyView& out,
                       int threads) {
    auto t = views_of(tensors);
    if (thresholds.size() != 2 * (t.size() - 1)) check_count(thresholds.size(), t.size() - 1, "thresholds");
    int64_t* o = results_of<int64_t>(out, int64_t(thresholds.size()));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::tie_counts(t, thresholds, c, o, threads);
}

static void ties(const std::vector<PyView>& tensors, const Reals& weights, const Reals& factors,
                 const PySelection& selection, bool normalize, double scale, int compute, const PyView& out,
                 int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    check_count(weights.size(), t.size() - 1, "weights");
    check_count(factors.size(), t.size() - 1, "factors");
    const auto s = selection_of(selection, t.size() - 1, t[0].n);
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::ties(t, weights, factors, s, normalize, scale, c, o, threads);
}

static void trimmed_l1(const std::vector<PyView>& tensors, const PySelection& selection, int compute, const PyView& out,
                       int threads) {
    auto t = views_of(tensors);
    const auto s = selection_of(selection, t.size() - 1, t[0].n);
    const int64_t blocks = s.row > 0 ? t[0].n / s.row : seme::blocks(t[0].n);
    double* o = results_of<double>(out, blocks * int64_t(t.size() - 1) * 2);
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::trimmed_l1(t, s, c, o, threads);
}

// row, columns, offset: see weights.h
using PyPlace = std::tuple<int64_t, int64_t, int64_t>;

// Weights of `count` tensors of n elements.
static seme::Weights weights_of(const Reals& weights, const PyPlace& place, size_t count, int64_t n) {
    auto [row, columns, offset] = place;
    if (row < 0 || columns < 0 || offset < 0 || (row > 0 && columns > 0)) throw std::invalid_argument("no such rows");
    if (row > 0 && n % row != 0) throw std::invalid_argument("not whole rows");
    check_count(weights.size(), count * size_t(row > 0 ? n / row : columns > 0 ? columns : 1), "weights");
    return {weights.data(), int64_t(count), row, columns, offset};
}

static void line_products(const std::vector<PyView>& tensors, bool relative, int64_t block, int64_t columns,
                          int compute, const PyView& out, int threads) {
    auto t = views_of(tensors);
    const int64_t count = int64_t(t.size()) - relative;
    if (count < 1) throw std::invalid_argument("no tensors");
    if (block < 1 || columns < 0 || (columns > 0 && (block % columns != 0 || t[0].n % columns != 0)))
        throw std::invalid_argument("not whole rows");
    const int64_t blocks = (t[0].n + block - 1) / block;
    double* o = results_of<double>(out, blocks * count * count * std::max<int64_t>(columns, 1));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::line_products(t, relative, block, columns, c, o, threads);
}

static void line_sum(const std::vector<PyView>& tensors, bool relative, const Reals& weights, const PyPlace& place,
                     int compute, const PyView& out, int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    auto w = weights_of(weights, place, t.size() - relative, o.n);
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::line_sum(t, relative, w, c, o, threads);
}

static void nearswap(const std::vector<PyView>& tensors, double t, double least, int compute, const PyView& out,
                     int threads) {
    View o = view_of(out);
    auto views = views_of(tensors, o.n);
    check_equal(int64_t(views.size()), 2, "tensors");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::nearswap(views, t, least, c, o, threads);
}

// Selection by the variance over the task vectors.

static void variance_histogram(const std::vector<PyView>& tensors, int64_t lowest, int64_t shift, int compute,
                               const PyView& out, int threads) {
    auto t = views_of(tensors);
    if (t.size() < 2) throw std::invalid_argument("no task vectors");
    if (lowest < 0) throw std::invalid_argument("lowest is negative");
    if (shift < 0 || shift > 47) throw std::invalid_argument("shift is not 0..47");
    int64_t* o = results_of<int64_t>(out, seme::kBins + 2);
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::variance_histogram(t, lowest, shift, c, o, threads);
}

static void variance_ties(const std::vector<PyView>& tensors, int64_t threshold, int compute, const PyView& out,
                          int threads) {
    auto t = views_of(tensors);
    if (t.size() < 2) throw std::invalid_argument("no task vectors");
    int64_t* o = results_of<int64_t>(out, 1);
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::variance_ties(t, threshold, c, o, threads);
}

static void selected_squares(const std::vector<PyView>& tensors, int64_t threshold, int64_t tie_quota, int compute,
                             const PyView& out, int threads) {
    auto t = views_of(tensors);
    if (t.size() < 2) throw std::invalid_argument("no task vectors");
    double* o = results_of<double>(out, seme::blocks(t[0].n) * int64_t(t.size() - 1));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::selected_squares(t, threshold, tie_quota, c, o, threads);
}

static void sce(const std::vector<PyView>& tensors, const Reals& coefficients, int64_t threshold, int64_t tie_quota,
                int compute, const PyView& out, int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    if (t.size() < 2) throw std::invalid_argument("no task vectors");
    check_count(coefficients.size(), t.size() - 1, "coefficients");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::sce(t, coefficients, threshold, tie_quota, c, o, threads);
}

static void ram(const std::vector<PyView>& tensors, const Reals& scales, double epsilon, bool rounded, int compute,
                const PyView& out, int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    check_count(scales.size(), t.size() - 1, "scales");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::ram(t, scales, epsilon, rounded, c, o, threads);
}

static void overlap_counts(const std::vector<PyView>& tensors, double epsilon, int compute, const PyView& out,
                           int threads) {
    auto t = views_of(tensors);
    int64_t* o = results_of<int64_t>(out, int64_t(t.size() - 1) * 2);
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::overlap_counts(t, epsilon, c, o, threads);
}

// A base and one other tensor in rows; the number of rows.
static int64_t rows_of(const std::vector<View>& tensors, int64_t row) {
    if (tensors.size() != 2) throw std::invalid_argument("a base and one tensor expected");
    if (row < 1 || tensors[0].n % row != 0) throw std::invalid_argument("no whole rows");
    return tensors[0].n / row;
}

static void row_divergence(const std::vector<PyView>& tensors, int64_t row, bool rounded, int compute,
                           const PyView& out, int threads) {
    auto t = views_of(tensors);
    double* o = results_of<double>(out, rows_of(t, row));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::row_divergence(t, row, rounded, c, o, threads);
}

static void importance_histogram(const std::vector<PyView>& tensors, const PyView& factors, int64_t row,
                                 const Integers& lowest, const Integers& shift, int compute, const PyView& out,
                                 int threads) {
    auto t = views_of(tensors);
    const double* f = results_of<double>(factors, rows_of(t, row));
    if (lowest.size() != shift.size()) throw std::invalid_argument("one shift per window expected");
    for (int64_t v : lowest)
        if (v < 0) throw std::invalid_argument("lowest is negative");
    for (int64_t v : shift)
        if (v < 0 || v > 47) throw std::invalid_argument("shift is not 0..47");
    int64_t* o = results_of<int64_t>(out, int64_t(lowest.size()) * (seme::kBins + 2));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::importance_histogram(t, f, row, lowest, shift, c, o, threads);
}

static void importance_fusion(const std::vector<PyView>& tensors, const PyView& factors, int64_t row, double threshold,
                              int compute, const PyView& out, int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    const double* f = results_of<double>(factors, rows_of(t, row));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::importance_fusion(t, f, row, threshold, c, o, threads);
}

// What surrounds the products of the matrix ops.

static void subtract(const PyMatrix& base, const PyMatrix& tensor, const PyMatrix& delta, int threads) {
    const auto b = matrix_of(base), t = matrix_of(tensor), d = working(delta, dtype_of(delta));
    check_shape(b, d.rows, d.cols, "base");
    check_shape(t, d.rows, d.cols, "tensor");
    py::gil_scoped_release release;
    seme::cpu::subtract(b, t, d, threads);
}

static void add_scaled(const PyMatrix& base, const PyMatrix& delta, double scale, const PyMatrix& out, int threads) {
    const auto b = matrix_of(base), d = working(delta, dtype_of(delta)), o = matrix_of(out);
    check_shape(b, d.rows, d.cols, "base");
    check_shape(o, d.rows, d.cols, "out");
    py::gil_scoped_release release;
    seme::cpu::add_scaled(b, d, scale, o, threads);
}

static void elect_select(const PyMatrix& z, int64_t experts, int64_t lowest, int shift, const PyView& tables,
                         int threads) {
    const auto m = working(z, dtype_of(z));
    if (experts < 1 || m.rows % experts != 0) throw std::invalid_argument("z is not whole experts");
    if (lowest < 0 || shift < 0 || shift > 47) throw std::invalid_argument("no window");
    double* t = results_of<double>(tables, int64_t(threads) * (seme::kBins + 2) * (1 + experts));
    py::gil_scoped_release release;
    seme::cpu::elect_select(m, experts, lowest, shift, t, threads);
}

static void elect(const PyMatrix& z, int64_t threshold, const Reals& etas, int threads) {
    const auto m = working(z, dtype_of(z));
    if (etas.empty() || m.rows % int64_t(etas.size()) != 0) throw std::invalid_argument("z is not whole experts");
    py::gil_scoped_release release;
    seme::cpu::elect(m, threshold, etas, threads);
}

static void nearest(const PyMatrix& vectors, const PyMatrix& bases, const PyMatrix& scores, const PyView& labels,
                    int threads) {
    const auto v = working(vectors, dtype_of(vectors)), b = matrix_of(bases), s = working(scores, v.dtype);
    if (s.cols < 1 || s.cols > 64 || s.cols > b.rows) throw std::invalid_argument("k is not 1 to 64");
    if (b.rows >= int64_t(1) << 32) throw std::invalid_argument("too many bases");
    check_equal(s.rows, v.rows, "rows of scores");
    check_equal(b.cols, v.cols, "columns of bases");
    int64_t* l = results_of<int64_t>(labels, s.rows * s.cols);
    py::gil_scoped_release release;
    seme::cpu::nearest(v, b, s, l, threads);
}

static void erase(const PyMatrix& vectors, const PyMatrix& bases, const PyMatrix& scores, const PyView& labels,
                  double dependent, const PyMatrix& residual, int threads) {
    const auto v = matrix_of(vectors), b = matrix_of(bases), s = working(scores, dtype_of(scores));
    const auto r = working(residual, s.dtype);
    if (s.cols < 1 || s.cols > 64) throw std::invalid_argument("k is not 1 to 64");
    check_equal(s.rows, v.rows, "rows of scores");
    check_equal(b.cols, v.cols, "columns of bases");
    check_shape(r, v.rows, v.cols, "residual");
    int64_t* l = results_of<int64_t>(labels, s.rows * s.cols);
    for (int64_t i = 0; i < s.rows * s.cols; ++i)
        if (l[i] < 0 || l[i] >= b.rows) throw std::invalid_argument("a label is none of the bases");
    py::gil_scoped_release release;
    seme::cpu::erase(v, b, s, l, dependent, r, threads);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of seme";
    m.attr("BLOCK") = seme::kBlock;
    m.def("isa", [] { return int(seme::isa()); });
    m.def("best_isa", [] { return int(seme::best_isa()); });
    m.def("set_isa", [](int i) { seme::set_isa(seme::Isa(i)); });
    m.def("weighted_sum", &weighted_sum);
    m.def("inner_products", &inner_products);
    m.def("line_products", &line_products);
    m.def("line_sum", &line_sum);
    m.def("nearswap", &nearswap);
    m.def("nonfinite", &nonfinite);
    m.def("task_vector_sum", &task_vector_sum);
    m.def("magnitude_histogram", &magnitude_histogram);
    m.def("find_in_histogram", &find_in_histogram);
    m.def("add_int64", &add_int64);
    m.def("read_runs", &read_runs);
    m.def("tie_counts", &tie_counts);
    m.def("ties", &ties);
    m.def("trimmed_l1", &trimmed_l1);
    m.def("variance_histogram", &variance_histogram);
    m.def("variance_ties", &variance_ties);
    m.def("selected_squares", &selected_squares);
    m.def("sce", &sce);
    m.def("ram", &ram);
    m.def("overlap_counts", &overlap_counts);
    m.def("row_divergence", &row_divergence);
    m.def("importance_histogram", &importance_histogram);
    m.def("importance_fusion", &importance_fusion);
    m.def("subtract", &subtract);
    m.def("add_scaled", &add_scaled);
    m.def("elect_select", &elect_select);
    m.def("elect", &elect);
    m.def("nearest", &nearest);
    m.def("erase", &erase);
}
