// The store's codec on raw pointers; sizes are checked in python/distilkernels/store/codec.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "store_codec.h"

namespace py = pybind11;
using namespace distilkernels;

namespace {

using Pointer = uintptr_t;
using Numbers = std::array<int64_t, 10>;

RowLayout layout(const Numbers& v) { return {v[0], uint64_t(v[1]), v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9]}; }

template <class T>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

void encode(const Numbers& numbers, double hi, double step, int64_t n, Pointer ids, Pointer logprobs, Pointer tail, Pointer rows) {
    py::gil_scoped_release release;
    store_encode(layout(numbers), {hi, step}, n, at<int32_t>(ids), at<float>(logprobs), at<float>(tail), at<uint8_t>(rows));
}

int64_t decode(const Numbers& numbers, double hi, double step, int64_t n, Pointer rows, Pointer ids, Pointer logprobs, Pointer tail) {
    py::gil_scoped_release release;
    return store_decode(layout(numbers), {hi, step}, n, at<uint8_t>(rows), at<int32_t>(ids), at<float>(logprobs), at<float>(tail));
}

}  // namespace

void bind_store(py::module_& m) {
    m.def("store_encode", &encode);
    m.def("store_decode", &decode);
}
