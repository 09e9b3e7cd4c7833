// distilkernels._cpp: pointers in, nothing out. Shapes and dtypes are checked in backends/cpp.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "isa.h"
#include "threads.h"

namespace py = pybind11;
using namespace distilkernels;

namespace {

using Pointer = uintptr_t;
using Shape = std::array<int64_t, 5>;                      // outer, inner, vocab, outer stride, inner stride
using HeadNumbers = std::tuple<double, double, double, int64_t>;  // temperature, scale, softcap or 0, columns
using IdNumbers = std::tuple<Pointer, bool, int64_t>;       // data, int64, K

template <class T>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

Rows rows(Pointer data, const Shape& s) { return {at<void>(data), s[0], s[1], s[2], s[3], s[4]}; }
Head head(const HeadNumbers& h) { return {std::get<0>(h), std::get<1>(h), std::get<2>(h), std::get<3>(h)}; }
Ids ids(const IdNumbers& i) { return {at<void>(std::get<0>(i)), std::get<1>(i), std::get<2>(i)}; }

void stats(int dtype, Pointer logits, const Shape& shape, const IdNumbers& id, Pointer thresholds, const HeadNumbers& h, int threads,
           const std::array<Pointer, 11>& out) {
    VocabStats a;
    a.dtype = DType(dtype);
    a.logits = rows(logits, shape);
    a.ids = ids(id);
    a.thresholds = at<void>(thresholds);
    a.head = head(h);
    a.lse = at<double>(out[0]);
    a.gathered = at<void>(out[1]);
    a.tail_lse = at<double>(out[2]);
    a.expected_logit = at<double>(out[3]);
    a.logit_sum = at<double>(out[4]);
    a.finite_count = at<int64_t>(out[5]);
    a.lse_t1 = at<double>(out[6]);
    a.max = at<double>(out[7]);
    a.argmax = at<int64_t>(out[8]);
    a.rank = at<int64_t>(out[9]);
    a.mass_above = at<void>(out[10]);
    py::gil_scoped_release release;
    for_rows(a, threads, kernels().vocab_stats);
}

// Before the first touch of a large fresh tensor: faulting it in by 4 KiB pages runs at 3 GB/s.
void advise_huge_pages(const Rows& r, size_t itemsize) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = 2 << 20;
    const auto begin = reinterpret_cast<uintptr_t>(r.data);
    const uintptr_t end = begin + ((r.outer - 1) * r.outer_stride + (r.inner - 1) * r.inner_stride + r.vocab) * itemsize;
    const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void stats_backward(int dtype, Pointer logits, const Shape& shape, const IdNumbers& id, Pointer entries, bool wide_entries, Pointer coef,
                    bool constant_or_t1, const HeadNumbers& h, int threads, Pointer out, const Shape& out_shape) {
    constexpr size_t itemsize[] = {4, 2, 2, 8};
    VocabStatsBackward a;
    a.dtype = DType(dtype);
    a.logits = rows(logits, shape);
    a.ids = ids(id);
    a.entries = at<void>(entries);
    a.wide_entries = wide_entries;
    a.coef = at<double>(coef);
    a.constant_or_t1 = constant_or_t1;
    a.head = head(h);
    a.out = rows(out, out_shape);
    py::gil_scoped_release release;
    if (out != logits) advise_huge_pages(a.out, itemsize[dtype]);
    for_rows(a, threads, kernels().vocab_stats_backward);
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
    m.doc() = "CPU kernels on raw pointers; see distilkernels.backends.cpp";
    m.def("vocab_stats", &stats);
    m.def("vocab_stats_backward", &stats_backward);
    m.def("isa", &isa);
    m.def("set_isa", &set_isa);
    m.def("available_isas", &available_isas);
#if defined(_OPENMP)
    forked();
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
}
