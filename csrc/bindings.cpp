// The module seme._C. Tensors arrive as (address, elements, dtype code); every size is checked again here,
// because past this file there are only pointers. The GIL is released around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "formulas.h"
#include "isa.h"

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

static void task_vector_sum(const std::vector<PyView>& tensors, const Reals& weights, double divisor, double scale,
                            int compute, const PyView& out, int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    check_count(weights.size(), t.size() - 1, "weights");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::task_vector_sum(t, weights, divisor, scale, c, o, threads);
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

static void tie_counts(const std::vector<PyView>& tensors, const Integers& thresholds, int compute, const PyView& out,
                       int threads) {
    auto t = views_of(tensors);
    check_count(thresholds.size(), t.size() - 1, "thresholds");
    int64_t* o = results_of<int64_t>(out, int64_t(thresholds.size()));
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::tie_counts(t, thresholds, c, o, threads);
}

static void ties(const std::vector<PyView>& tensors, const Reals& weights, const Integers& thresholds,
                 const Integers& tie_quotas, const Reals& factors, bool normalize, double scale, int compute,
                 const PyView& out, int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    check_count(weights.size(), t.size() - 1, "weights");
    check_count(thresholds.size(), t.size() - 1, "thresholds");
    check_count(tie_quotas.size(), t.size() - 1, "tie_quotas");
    check_count(factors.size(), t.size() - 1, "factors");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::ties(t, weights, thresholds, tie_quotas, factors, normalize, scale, c, o, threads);
}

static void trimmed_l1(const std::vector<PyView>& tensors, const Integers& thresholds, const Integers& tie_quotas,
                       int compute, const PyView& out, int threads) {
    auto t = views_of(tensors);
    check_count(thresholds.size(), t.size() - 1, "thresholds");
    check_count(tie_quotas.size(), t.size() - 1, "tie_quotas");
    double* o = results_of<double>(out, seme::blocks(t[0].n) * int64_t(thresholds.size()) * 2);
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::trimmed_l1(t, thresholds, tie_quotas, c, o, threads);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of seme";
    m.attr("BLOCK") = seme::kBlock;
    m.def("isa", [] { return int(seme::isa()); });
    m.def("best_isa", [] { return int(seme::best_isa()); });
    m.def("set_isa", [](int i) { seme::set_isa(seme::Isa(i)); });
    m.def("weighted_sum", &weighted_sum);
    m.def("inner_products", &inner_products);
    m.def("nonfinite", &nonfinite);
    m.def("task_vector_sum", &task_vector_sum);
    m.def("magnitude_histogram", &magnitude_histogram);
    m.def("find_in_histogram", &find_in_histogram);
    m.def("add_int64", &add_int64);
    m.def("tie_counts", &tie_counts);
    m.def("ties", &ties);
    m.def("trimmed_l1", &trimmed_l1);
}
