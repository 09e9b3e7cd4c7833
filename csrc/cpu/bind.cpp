// distilkernels._cpp: pointers in, nothing out. Shapes and dtypes are checked in backends/cpp.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../philox.h"
#include "isa.h"
#include "threads.h"

namespace py = pybind11;
using namespace distilkernels;

void bind_store(py::module_&);  // store_bind.cpp
void bind_kv(py::module_&);     // kv_bind.cpp

namespace {

using Pointer = uintptr_t;
using Shape = std::array<int64_t, 5>;                      // outer, inner, vocab, outer stride, inner stride
using HeadNumbers = std::tuple<double, double, double, int64_t>;  // temperature, scale, softcap or 0, columns
using IdNumbers = std::tuple<Pointer, bool, int64_t>;       // data, int64, K
using OperandNumbers = std::tuple<int, Pointer, Shape, std::array<Pointer, 5>>;  // dtype, logits; rows, temperature, bar, lse, argmax
using MatrixNumbers = std::tuple<int, Pointer, int64_t, int64_t, int64_t>;  // dtype, data, rows, columns, stride

template <class T>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

Rows rows(Pointer data, const Shape& s) { return {at<void>(data), s[0], s[1], s[2], s[3], s[4]}; }
Head head(const HeadNumbers& h) { return {std::get<0>(h), std::get<1>(h), std::get<2>(h), std::get<3>(h)}; }
Ids ids(const IdNumbers& i) { return {at<void>(std::get<0>(i)), std::get<1>(i), std::get<2>(i)}; }
Matrix matrix(const MatrixNumbers& m) { return {DType(std::get<0>(m)), at<void>(std::get<1>(m)), std::get<2>(m), std::get<3>(m), std::get<4>(m)}; }

void stats(int dtype, Pointer logits, const Shape& shape, const IdNumbers& id, Pointer thresholds, const HeadNumbers& h, int threads,
           const std::array<Pointer, 12>& out) {
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
    a.second = at<double>(out[9]);
    a.rank = at<int64_t>(out[10]);
    a.mass_above = at<void>(out[11]);
    py::gil_scoped_release release;
    for_items(a, threads, kernels().vocab_stats);
}

// Before the first touch of a large fresh tensor: faulting it in by 4 KiB pages runs at 3 GB/s.
void advise_huge_pages(const Rows& r, size_t item) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = 2 << 20;
    const auto begin = reinterpret_cast<uintptr_t>(r.data);
    const uintptr_t end = begin + ((r.outer - 1) * r.outer_stride + (r.inner - 1) * r.inner_stride + r.vocab) * item;
    const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void stats_backward(int dtype, Pointer logits, const Shape& shape, const IdNumbers& id, Pointer entries, bool wide_entries, Pointer coef,
                    bool constant_or_t1, const HeadNumbers& h, int threads, Pointer out, const Shape& out_shape) {
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
    if (out != logits) advise_huge_pages(a.out, itemsize(a.dtype));
    for_items(a, threads, kernels().vocab_stats_backward);
}

using PairNumbers = std::tuple<int, Pointer, Shape, HeadNumbers>;  // dtype, data, rows, head of one side

void pairs(const PairNumbers& student, const PairNumbers& teacher, bool with_t1, int second, Pointer w, int threads, Pointer out) {
    PairStats a;
    a.dtype = DType(std::get<0>(student));
    a.teacher_dtype = DType(std::get<0>(teacher));
    a.logits = rows(std::get<1>(student), std::get<2>(student));
    a.teacher = rows(std::get<1>(teacher), std::get<2>(teacher));
    a.head = head(std::get<3>(student));
    a.teacher_head = head(std::get<3>(teacher));
    a.with_t1 = with_t1;
    a.second = Second(second);
    a.w = at<double>(w);
    a.out = at<double>(out);
    py::gil_scoped_release release;
    for_items(a, threads, kernels().pair_stats);
}

void pairs_backward(const PairNumbers& student, const PairNumbers& teacher, Pointer coef, bool with_t1, int second, int threads,
                    Pointer out, const Shape& out_shape) {
    constexpr size_t itemsize[] = {4, 2, 2, 8};
    PairStatsBackward a;
    a.dtype = DType(std::get<0>(student));
    a.teacher_dtype = DType(std::get<0>(teacher));
    a.logits = rows(std::get<1>(student), std::get<2>(student));
    a.teacher = rows(std::get<1>(teacher), std::get<2>(teacher));
    a.coef = at<double>(coef);
    a.with_t1 = with_t1;
    a.second = Second(second);
    a.head = head(std::get<3>(student));
    a.teacher_head = head(std::get<3>(teacher));
    a.out = rows(out, out_shape);
    py::gil_scoped_release release;
    if (out != std::get<1>(student)) advise_huge_pages(a.out, itemsize[std::get<0>(student)]);
    for_items(a, threads, kernels().pair_stats_backward);
}

void products(const MatrixNumbers& hidden, const MatrixNumbers& weight, const IdNumbers& id, int threads, Pointer out) {
    const GatherDot a{matrix(hidden), matrix(weight), ids(id), at<void>(out)};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().gather_dot);
}

void products_hidden_grad(int operand, Pointer grad, const MatrixNumbers& weight, const IdNumbers& id, int64_t rows, int threads, Pointer out) {
    const GatherDotHiddenGrad a{DType(operand), at<void>(grad), matrix(weight), ids(id), rows, at<void>(out)};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().gather_dot_hidden_grad);
}

void products_weight_grad(Pointer grad, int64_t slots, const MatrixNumbers& hidden, Pointer order, Pointer targets, int64_t pairs, int threads,
                          const MatrixNumbers& out) {
    const GatherDotWeightGrad a{at<void>(grad), slots, matrix(hidden), at<int64_t>(order), at<int64_t>(targets), pairs, matrix(out)};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().gather_dot_weight_grad);
}

void select_topk(int dtype, Pointer logits, const Shape& shape, const HeadNumbers& h, int64_t k, int threads, const std::array<Pointer, 4>& out) {
    const TopkSelect a{DType(dtype), rows(logits, shape), head(h), k, at<void>(out[0]), at<int32_t>(out[1]), at<double>(out[2]), at<double>(out[3])};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().topk_select);
}

void draw(int dtype, Pointer logits, const Shape& shape, const HeadNumbers& h, double tau, Pointer seeds, Pointer positions, int64_t count,
           int threads, const std::array<Pointer, 4>& out) {
    const DrawRows a{DType(dtype), rows(logits, shape), head(h), tau, at<int64_t>(seeds), at<int64_t>(positions), count,
                     at<int32_t>(out[0]), at<void>(out[1]), at<double>(out[2]), at<double>(out[3])};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().draw_rows);
}

void filter(int dtype, Pointer logits, const Shape& shape, int64_t columns, const std::array<Pointer, 4>& by, Pointer chosen, int64_t count,
            int threads, const std::array<Pointer, 5>& out) {
    const FilterRows a{DType(dtype), rows(logits, shape), columns, at<double>(by[0]), at<int64_t>(by[1]), at<double>(by[2]), at<double>(by[3]),
                       at<void>(out[0]), at<double>(out[1]), at<double>(out[2]), at<double>(out[3]), at<int64_t>(out[4]),
                       at<int64_t>(chosen), count};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().filter_rows);
}

DrawWeights weights(int mode, const OperandNumbers& first, const OperandNumbers& second, Pointer scale, int64_t count, int64_t columns) {
    const auto operand = [](const OperandNumbers& o) {
        const std::array<Pointer, 5>& law = std::get<3>(o);
        return FilteredRows{DType(std::get<0>(o)), rows(std::get<1>(o), std::get<2>(o)), at<int64_t>(law[0]), at<double>(law[1]), at<void>(law[2]),
                       at<double>(law[3]), at<int64_t>(law[4])};
    };
    return {Mode(mode), operand(first), operand(second), at<double>(scale), count, columns};
}

void weigh(int mode, const OperandNumbers& first, const OperandNumbers& second, Pointer scale, int64_t count, int64_t columns, int threads, Pointer out) {
    const WeighRows a{weights(mode, first, second, scale, count, columns), at<double>(out)};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().weigh_rows);
}

void sample(int mode, const OperandNumbers& first, const OperandNumbers& second, Pointer scale, int64_t count, int64_t columns, int64_t vocab,
            const std::array<Pointer, 4>& noise, int64_t stream, int threads, const std::array<Pointer, 4>& out) {
    const SampleRows a{weights(mode, first, second, scale, count, columns), vocab, at<int64_t>(noise[0]), at<int64_t>(noise[1]), at<int64_t>(noise[2]),
                       at<int64_t>(noise[3]), stream, at<int64_t>(out[0]), at<void>(out[1]), at<int64_t>(out[2]), at<bool>(out[3])};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().sample_rows);
}

// No rows, no vectors: a few numbers a request.
void coins(Pointer seeds, Pointer positions, Pointer offsets, int64_t stream, int64_t count, Pointer out) {
    for (int64_t i = 0; i < count; ++i) {
        const PhiloxWords words =
            philox(uint64_t(at<int64_t>(seeds)[i]), {0, unsigned(at<int64_t>(positions)[i]), unsigned(at<int64_t>(offsets)[i]), unsigned(stream)});
        at<double>(out)[i] = uniform53(words.x, words.y);
    }
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
    m.doc() = "CPU kernels on raw pointers; see distilkernels.backends.cpp";
    m.def("vocab_stats", &stats);
    m.def("vocab_stats_backward", &stats_backward);
    m.def("pair_stats", &pairs);
    m.def("pair_stats_backward", &pairs_backward);
    m.def("gather_dot", &products);
    m.def("gather_dot_hidden_grad", &products_hidden_grad);
    m.def("gather_dot_weight_grad", &products_weight_grad);
    bind_store(m);
    bind_kv(m);
    m.def("topk_select", &select_topk);
    m.def("draw_rows", &draw);
    m.def("filter_rows", &filter);
    m.def("sample_rows", &sample);
    m.def("weigh_rows", &weigh);
    m.def("coin", &coins);
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
