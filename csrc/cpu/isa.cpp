#include "isa.h"

#include <atomic>

namespace distilkernels {
namespace {

struct Isa {
    const char* name;
    const Kernels* kernels;
    bool present;
};

// Best first.
const std::vector<Isa>& all() {
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#endif
    static const std::vector<Isa> isas = {
#if defined(__x86_64__)
        {"avx512bf16", &avx512bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
        {"avx512", &avx512::kernels, avx512},
        {"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
        {"baseline", &baseline::kernels, true},
    };
    return isas;
}

const Isa* best() {
    for (const Isa& isa : all())
        if (isa.present) return &isa;
    return nullptr;
}

std::atomic<const Isa*>& current() {
    static std::atomic<const Isa*> isa{best()};
    return isa;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed)->kernels; }

std::string isa() { return current().load()->name; }

bool set_isa(const std::string& name) {
    for (const Isa& isa : all())
        if (isa.present && name == isa.name) {
            current().store(&isa);
            return true;
        }
    return false;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : all())
        if (isa.present) names.push_back(isa.name);
    return names;
}

}  // namespace distilkernels
