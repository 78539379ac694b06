// The module seme._C. Tensors arrive as (address, elements, dtype code); every size is checked again here,
// because past this file there are only pointers. The GIL is released around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "isa.h"
#include "seme.h"

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

static void weighted_sum(const std::vector<PyView>& tensors, const std::vector<double>& weights, double divisor,
                         int compute, const PyView& out, int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    check_count(weights.size(), t.size(), "weights");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::weighted_sum(t, weights, divisor, c, o, threads);
}

// Ops on task vectors: tensors[0] is the base, so there is one entry less per tensor.
static void task_vector_sum(const std::vector<PyView>& tensors, const std::vector<double>& weights, double divisor,
                            double scale, int compute, const PyView& out, int threads) {
    View o = view_of(out);
    auto t = views_of(tensors, o.n);
    check_count(weights.size(), t.size() - 1, "weights");
    DType c = dtype_of(compute);
    py::gil_scoped_release release;
    seme::cpu::task_vector_sum(t, weights, divisor, scale, c, o, threads);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of seme";
    m.attr("BLOCK") = seme::kBlock;
    m.def("isa", [] { return int(seme::isa()); });
    m.def("best_isa", [] { return int(seme::best_isa()); });
    m.def("set_isa", [](int i) { seme::set_isa(seme::Isa(i)); });
    m.def("weighted_sum", &weighted_sum);
    m.def("task_vector_sum", &task_vector_sum);
}
