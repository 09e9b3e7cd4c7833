// Sums of e^z, kept in powers of two: w = z·log2(e) for the head that the host compiled in.
//
// SOFTCAP 0: z = slope·y          1: z = cap·tanh(slope·y)
#pragma once

#include <logits.cuh>

struct Head {
    double slope, cap;
    float scale;  // of w, rounded once: every w of the kernel uses the same, and unit() takes its rounding out again

    __device__ Head(double slope, double cap) : slope(slope), cap(cap), scale((float)((SOFTCAP ? cap : slope) * 1.4426950408889634)) {}

    __device__ __forceinline__ float w(float y) const { return SOFTCAP ? __fmul_rn(tanhf(y * (float)slope), scale) : __fmul_rn(y, scale); }

    // What sums are relative to where y is their largest: w(y), but 0 where that is infinite.
    __device__ __forceinline__ float reference(float y) const {
        const float at = w(y);
        return SOFTCAP || fabsf(at) < kInfinity ? at : 0.0f;
    }

    // 2^(w(y) − reference) with one rounding of the exponent.
    __device__ __forceinline__ float term(float y, float reference) const {
        return exp2_approx(SOFTCAP ? w(y) - reference : __fmaf_rn(y, scale, -reference));
    }

    __device__ double z(float y) const { return SOFTCAP ? cap * tanh(slope * y) : slope * y; }

    // z for a unit of w.
    __device__ double unit() const { return (SOFTCAP ? cap : slope) / (double)scale; }
};

// sum · 2^reference(top), where top is the largest y that went into it.
struct Mass {
    float top = -kInfinity;
    double sum = 0;

    __device__ __forceinline__ void add(const Head& head, float y, double terms) {
        if (terms == 0) return;
        if (sum == 0) {
            top = y, sum = terms;
        } else if (y > top) {
            sum = sum * exp2_approx(head.reference(top) - head.reference(y)) + terms;
            top = y;
        } else {
            sum += terms * exp2_approx(head.reference(y) - head.reference(top));
        }
    }
};
