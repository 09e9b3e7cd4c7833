// The kernels on caches in distilkernels._cpp. Shapes and dtypes are checked in backends/cpp_kv.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "isa.h"
#include "threads.h"

namespace py = pybind11;
using namespace distilkernels;

namespace {

using Pointer = uintptr_t;
using CacheNumbers = std::tuple<int, Pointer, std::array<int64_t, 7>>;  // dtype, data, shape, strides of all but the last
using Pointers = std::array<Pointer, 3>;

template <class T>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

Cache cache(const CacheNumbers& c) {
    const auto& s = std::get<2>(c);
    return {DType(std::get<0>(c)), at<void>(std::get<1>(c)), s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
}

Counted counted(const Pointers& p) { return {at<int32_t>(p[0]), at<int32_t>(p[1]), at<uint8_t>(p[2])}; }

void redundancy(const CacheNumbers& keys, const Pointers& count, double threshold, const Pointers& out, int threads) {
    const KeyRedundancy a{cache(keys), counted(count), threshold, at<float>(out[0]), at<int32_t>(out[1]), at<float>(out[2])};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().key_redundancy);
}

void importance(const CacheNumbers& queries, const CacheNumbers& keys, const Pointers& count, Pointer query_mask, double scale, int group_reduce,
                int window_reduce, bool causal, Pointer lse, Pointer out, const Pointers& sums_count, Pointer sums, int threads) {
    const WindowImportance a{cache(queries), cache(keys), counted(count), at<uint8_t>(query_mask), scale, GroupReduce(group_reduce),
                             WindowReduce(window_reduce), causal, at<float>(lse), at<float>(out),
                             {cache(keys), counted(sums_count), 0, at<float>(sums), nullptr, nullptr}};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().window_importance);
}

void gather(const CacheNumbers& keys, const CacheNumbers& values, Pointer indices, const std::array<Pointer, 4>& tables, int64_t rows, int64_t width,
            bool interleaved, const CacheNumbers& out_keys, const CacheNumbers& out_values, int threads) {
    const KvGather a{cache(keys), cache(values), at<int32_t>(indices),
                     {at<float>(tables[0]), at<float>(tables[1]), at<int32_t>(tables[2]), at<int32_t>(tables[3]), rows, width, interleaved},
                     cache(out_keys), cache(out_values)};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().kv_gather);
}

void align(const std::vector<CacheNumbers>& student, const std::vector<CacheNumbers>& teacher,
           const std::vector<std::pair<Pointer, std::array<int64_t, 3>>>& masks, const std::vector<Pointer>& grads, int loss, double beta,
           int normalize, Pointer coef, Pointer sums, int threads) {
    KvAlign a{{}, Loss(loss), beta, Normalize(normalize), at<double>(coef), at<double>(sums)};
    for (size_t i = 0; i < student.size(); ++i) {
        const auto& strides = masks[i].second;
        a.pairs.push_back({cache(student[i]), cache(teacher[i]), at<uint8_t>(masks[i].first), {strides[0], strides[1], strides[2]},
                           at<void>(grads.empty() ? 0 : grads[i])});
    }
    py::gil_scoped_release release;
    for_items(a, threads, kernels().kv_align);
}

void recurrence(const CacheNumbers& attention, int64_t heads, int64_t step, double alpha, Pointer last_seen, const std::array<int64_t, 2>& last_strides,
                Pointer max_interval, const std::array<int64_t, 2>& interval_strides, int threads) {
    const RecurrenceUpdate a{cache(attention), heads, step, alpha, at<int32_t>(last_seen), at<int32_t>(max_interval),
                             {last_strides[0], last_strides[1]}, {interval_strides[0], interval_strides[1]}};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().recurrence_update);
}

}  // namespace

void bind_kv(py::module_& m) {
    m.def("key_redundancy", &redundancy);
    m.def("window_importance", &importance);
    m.def("kv_gather", &gather);
    m.def("kv_align", &align);
    m.def("recurrence_update", &recurrence);
}
