#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>

#include "../philox.h"
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
#endif

namespace distilkernels {
namespace avx512bf16 {
#define DISTILKERNELS_NATIVE_BF16
#define DISTILKERNELS_BYTES
#include "vec_avx512.h"
#include "kernels.inc.h"
}  // namespace avx512bf16
}  // namespace distilkernels

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
