// Philox4x32-10 (Salmon et al., SC 2011) for C++ and CUDA; primitives/philox.py is the definition. Includes nothing: NVRTC has no <cstdint>.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define DISTILKERNELS_ANYWHERE __host__ __device__ inline
#else
#define DISTILKERNELS_ANYWHERE inline
#endif

namespace distilkernels {

// The last counter word: what a number is for.
enum class Stream : unsigned { draft, acceptance, retry_coin, retry_draw, fallback, gate, capture };

struct PhiloxWords {
    unsigned x, y, z, w;
};

DISTILKERNELS_ANYWHERE PhiloxWords philox(unsigned long long seed, PhiloxWords counter) {
    unsigned low = unsigned(seed), high = unsigned(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned long long p = 0xD2511F53ull * counter.x, q = 0xCD9E8D57ull * counter.z;
        counter = {unsigned(q >> 32) ^ counter.y ^ low, unsigned(q), unsigned(p >> 32) ^ counter.w ^ high, unsigned(p)};
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    return counter;
}

// Two words as a number in (0, 1): 53 bits and a half; never 0, at most 1 − 2^−53.
DISTILKERNELS_ANYWHERE double uniform53(unsigned high, unsigned low) {
    const double u = (double((unsigned long long)(high) << 21 | low >> 11) + 0.5) * 0x1p-53;
    return u < 1 - 0x1p-53 ? u : 1 - 0x1p-53;
}

}  // namespace distilkernels

#undef DISTILKERNELS_ANYWHERE
