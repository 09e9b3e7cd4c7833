// Reading a row of logits: eight columns a lane from 16-byte loads, as the numbers y that the order is taken on.
//
// LOGIT   0 float, 1 bfloat16, 2 half
// ORDER   the sign of logit_scale: y = ORDER * x, so that a larger y always comes first
// ALIGNED 1 where every row starts on 16 bytes
#pragma once

#include <ptx.cuh>

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int kVector = 8;                          // columns of one lane
constexpr int kBytes = LOGIT == 0 ? 4 : 2;          // of one logit
constexpr int kWords = kVector * kBytes / 4;        // of one lane's columns
constexpr int kLoads = kWords / 4 + !ALIGNED;       // a row that starts inside a 16-byte granule needs one more of them
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

struct Row {
    const char* bytes;
    int columns;
};

// What 16-byte loads brought for one lane, unpacked later so that several can be in flight.
struct Raw {
    uint4 granule[kLoads];
};

__device__ __forceinline__ Raw load(const Row& row, int first) {
    Raw raw;
    const char* at = row.bytes + (long long)first * kBytes;
    const u32 shift = ALIGNED ? 0 : (u32)(u64)at & 15;
    const uint4* granules = (const uint4*)(at - shift);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
        // the granule after the last whole one holds columns of ours only if the row starts off a boundary
        if (ALIGNED || i + 1 < kLoads || shift) raw.granule[i] = __ldg(granules + i);
    return raw;
}

__device__ __forceinline__ float number(u32 word, int half) {
#if LOGIT == 0
    return __uint_as_float(word);
#elif LOGIT == 1
    return __uint_as_float(half ? word & 0xffff0000u : word << 16);
#else
    return half_bits_to_float((unsigned short)(half ? word >> 16 : word));
#endif
}

__device__ __forceinline__ void unpack(const Row& row, const Raw& raw, float (&y)[kVector]) {
    u32 word[4 * kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        word[4 * i] = raw.granule[i].x;
        word[4 * i + 1] = raw.granule[i].y;
        word[4 * i + 2] = raw.granule[i].z;
        word[4 * i + 3] = raw.granule[i].w;
    }
    if (!ALIGNED) {
        // the same for all lanes of a row; array indices stay constants, so that words stay in registers
        const u32 shift = (u32)(u64)row.bytes & 15;
        if (shift & 4)
#pragma unroll
            for (int i = 0; i + 1 < 4 * kLoads; ++i) word[i] = word[i + 1];
        if (shift & 8)
#pragma unroll
            for (int i = 0; i + 2 < 4 * kLoads; ++i) word[i] = word[i + 2];
        if (LOGIT != 0 && (shift & 2))
#pragma unroll
            for (int i = 0; i < kWords; ++i) word[i] = __funnelshift_r(word[i], word[i + 1], 16);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
        const float x = LOGIT == 0 ? number(word[j], 0) : number(word[j / 2], j % 2);
        y[j] = ORDER == 1 ? x : ORDER * x;
    }
}

// Columns [first, first + 8) of a row that may end among them; −infinity stands for the columns that do not exist.
__device__ __forceinline__ void read(const Row& row, int first, float (&y)[kVector]) {
    if (first + kVector <= row.columns) {
        const Raw raw = load(row, first);
        unpack(row, raw, y);
        return;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
        y[j] = -kInfinity;
        if (first + j < row.columns) {
            const char* at = row.bytes + (long long)(first + j) * kBytes;
            const float x = number(LOGIT == 0 ? __ldg((const u32*)at) : __ldg((const unsigned short*)at), 0);
            y[j] = ORDER == 1 ? x : ORDER * x;
        }
    }
}

// An unsigned integer with the order of y; −0 and +0 are one. Not for NaN.
__device__ __forceinline__ u32 order_key(float y) {
    const u32 bits = __float_as_uint(y + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float from_order_key(u32 key) {
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}
