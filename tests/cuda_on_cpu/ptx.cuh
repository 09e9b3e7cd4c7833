// What csrc/cuda/ptx.cuh says in PTX, no more exact than the device is.
#pragma once

#include <cfloat>

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    if (!(y >= FLT_MIN)) return y != y ? y : 0.0f;
    if (!(y < 1e38f)) return y;
    // up to 2 ulp off, up or down as the bits of x have it; exact at 0 as on the device
    const unsigned bits = __float_as_uint(x);
    return x == 0 ? 1.0f : __uint_as_float(__float_as_uint(y) + bits * 2654435761u % 5 - 2);
}

inline float half_bits_to_float(unsigned short bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24);
    if (exponent == 31) size = mantissa ? NAN : INFINITY;
    return bits >> 15 ? -size : size;
}
