#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>

#include "../philox.h"
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace distilkernels {
namespace avx2 {
#include "vec_avx2.h"
#include "kernels.inc.h"
}  // namespace avx2
}  // namespace distilkernels

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
