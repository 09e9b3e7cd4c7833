// How a tensor describes itself to C without its library's headers: DLPack's exchange interface (dlpack.h 1.3, in PyTorch from 2.10
// on). Asking Python for a pointer, a shape and strides costs half a microsecond a tensor, and an alignment loss has a hundred.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace distilkernels {

struct ExchangedTensor {
    void* data;
    int32_t device_type, device;
    int32_t dimensions;
    uint8_t kind, bits;  // kFloating or kBFloat16
    uint16_t lanes;
    int64_t *shape, *strides;  // of the tensor itself: nothing is owned
    uint64_t byte_offset;

    static constexpr uint8_t kFloating = 2, kBFloat16 = 4;
};

struct ExchangeInterface {
    uint32_t major, minor;
    const ExchangeInterface* older;
    void *allocate, *to_managed, *from_managed;
    int (*describe)(void* object, ExchangedTensor* out);  // not 0: a Python error is set
    void* current_stream;
};

// The version that is known here, of what a tensor class keeps in `__dlpack_c_exchange_api__`; null without.
inline const ExchangeInterface* exchange_interface(pybind11::handle capsule) {
    constexpr const char* kName = "dlpack_exchange_api";
    if (!PyCapsule_IsValid(capsule.ptr(), kName)) return nullptr;
    auto* found = static_cast<const ExchangeInterface*>(PyCapsule_GetPointer(capsule.ptr(), kName));
    while (found && found->major != 1) found = found->older;
    return found;
}

inline ExchangedTensor described(const ExchangeInterface& interface, pybind11::handle tensor) {
    ExchangedTensor out;
    if (interface.describe(tensor.ptr(), &out) != 0) throw pybind11::error_already_set();
    return out;
}

}  // namespace distilkernels
