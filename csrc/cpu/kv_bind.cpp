// The kernels on caches in distilkernels._cpp. Shapes and dtypes are checked in backends/cpp_kv.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "exchange.h"
#include "isa.h"
#include "threads.h"

namespace py = pybind11;
using namespace distilkernels;

namespace {

const ExchangeInterface* exchange = nullptr;

}  // namespace

// A tensor [B, H, T, D] whose last stride is 1, where there is an exchange interface; or dtype, data, shape and strides of all but the last.
template <>
struct pybind11::detail::type_caster<Cache> {
    PYBIND11_TYPE_CASTER(Cache, const_name("Cache"));

    bool load(handle from, bool convert) {
        if (!PyTuple_Check(from.ptr())) return exchange && load_tensor(described(*exchange, from));
        make_caster<std::tuple<int, uintptr_t, std::array<int64_t, 7>>> numbers;
        if (!numbers.load(from, convert)) return false;
        const auto [dtype, data, s] = cast_op<std::tuple<int, uintptr_t, std::array<int64_t, 7>>>(numbers);
        value = {DType(dtype), reinterpret_cast<void*>(data), s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
        return true;
    }

private:
    bool load_tensor(const ExchangedTensor& t) {
        if (t.dimensions != 4) return false;
        DType dtype;
        if (t.kind == ExchangedTensor::kBFloat16) dtype = DType::bf16;
        else if (t.bits == 32) dtype = DType::f32;
        else if (t.bits == 16) dtype = DType::f16;
        else dtype = DType::f64;
        value = {dtype,      static_cast<char*>(t.data) + t.byte_offset, t.shape[0], t.shape[1], t.shape[2], t.shape[3], t.strides[0], t.strides[1],
                 t.strides[2]};
        return true;
    }
};

namespace {

using Pointer = uintptr_t;
using Pointers = std::array<Pointer, 3>;

template <class T>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

Counted counted(const Pointers& p) { return {at<int32_t>(p[0]), at<int32_t>(p[1]), at<uint8_t>(p[2])}; }

void redundancy(const Cache& keys, const Pointers& count, double threshold, const Pointers& out, int threads) {
    const KeyRedundancy a{keys, counted(count), threshold, at<float>(out[0]), at<int32_t>(out[1]), at<float>(out[2])};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().key_redundancy);
}

void importance(const Cache& queries, const Cache& keys, const Pointers& count, Pointer query_mask, double scale, int group_reduce,
                int window_reduce, bool causal, Pointer lse, Pointer out, const Pointers& sums_count, Pointer sums, int threads) {
    const WindowImportance a{queries, keys, counted(count), at<uint8_t>(query_mask), scale, GroupReduce(group_reduce),
                             WindowReduce(window_reduce), causal, at<float>(lse), at<float>(out),
                             {keys, counted(sums_count), 0, at<float>(sums), nullptr, nullptr}};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().window_importance);
}

void gather(const Cache& keys, const Cache& values, Pointer indices, const std::array<Pointer, 4>& tables, int64_t rows, int64_t width,
            bool interleaved, const Cache& out_keys, const Cache& out_values, int threads) {
    const KvGather a{keys, values, at<int32_t>(indices),
                     {at<float>(tables[0]), at<float>(tables[1]), at<int32_t>(tables[2]), at<int32_t>(tables[3]), rows, width, interleaved},
                     out_keys, out_values};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().kv_gather);
}

void align(const std::vector<Cache>& student, const std::vector<Cache>& teacher,
           const std::vector<std::pair<Pointer, std::array<int64_t, 3>>>& masks, const std::vector<Pointer>& grads, int loss, double beta,
           int normalize, Pointer coef, Pointer sums, int threads) {
    KvAlign a{{}, Loss(loss), beta, Normalize(normalize), at<double>(coef), at<double>(sums)};
    for (size_t i = 0; i < student.size(); ++i) {
        const auto& strides = masks[i].second;
        a.pairs.push_back({student[i], teacher[i], at<uint8_t>(masks[i].first), {strides[0], strides[1], strides[2]},
                           at<void>(grads.empty() ? 0 : grads[i])});
    }
    py::gil_scoped_release release;
    for_items(a, threads, kernels().kv_align);
}

void recurrence(const Cache& attention, int64_t heads, int64_t step, double alpha, Pointer last_seen, const std::array<int64_t, 2>& last_strides,
                Pointer max_interval, const std::array<int64_t, 2>& interval_strides, int threads) {
    const RecurrenceUpdate a{attention, heads, step, alpha, at<int32_t>(last_seen), at<int32_t>(max_interval),
                             {last_strides[0], last_strides[1]}, {interval_strides[0], interval_strides[1]}};
    py::gil_scoped_release release;
    for_items(a, threads, kernels().recurrence_update);
}

}  // namespace

void bind_kv(py::module_& m) {
    // whether tensors may be given for caches from now on; None takes that back
    m.def("exchange_by", [](const py::object& capsule) { return (exchange = exchange_interface(capsule)) != nullptr; });
    m.def("key_redundancy", &redundancy);
    m.def("window_importance", &importance);
    m.def("kv_gather", &gather);
    m.def("kv_align", &align);
    m.def("recurrence_update", &recurrence);
}
