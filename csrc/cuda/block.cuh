// Reductions, ordered selection and sorting by one block of THREADS threads.
#pragma once

#include <mass.cuh>

constexpr int kWarps = THREADS / 32;
constexpr u32 kAll = 0xffffffffu;

struct Histogram {
    int bins[256];
    int digit, above, within;  // what find() found
    double sums[kWarps];
    float tops[kWarps];
};

__device__ __forceinline__ int thread() { return (int)threadIdx.x; }
__device__ __forceinline__ int lane() { return thread() & 31; }
__device__ __forceinline__ int warp() { return thread() >> 5; }

// Whole warps call it, so that lanes with one digit send one atomic: leading digits of logits are nearly all equal.
__device__ __forceinline__ void count_digit(Histogram& shared, bool counts, u32 digit) {
    const u32 active = __ballot_sync(kAll, counts);
    if (!counts) return;
    const u32 peers = __match_any_sync(active, digit);
    if (lane() == __ffs((int)peers) - 1) atomicAdd(&shared.bins[digit], __popc(peers));
}

// The bin of the need-th largest digit counted, how many are in the bins above it and how many in it.
__device__ __forceinline__ void find(Histogram& shared, int need) {
    __syncthreads();
    if (warp() == 0) {
        const int highest = 255 - 8 * lane();
        int own = 0;
        for (int j = 0; j < 8; ++j) own += shared.bins[highest - j];
        int upto = own;
        for (int d = 1; d < 32; d *= 2) {
            const int left = __shfl_up_sync(kAll, upto, d);
            if (lane() >= d) upto += left;
        }
        int above = upto - own;
        if (above < need && need <= upto) {
            int digit = highest;
            while (above + shared.bins[digit] < need) above += shared.bins[digit--];
            shared.digit = digit, shared.above = above, shared.within = shared.bins[digit];
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void clear(Histogram& shared) {
    for (int i = thread(); i < 256; i += THREADS) shared.bins[i] = 0;
    __syncthreads();
}

// The sum over the block, in an order that depends on nothing but THREADS; every thread gets it.
__device__ __forceinline__ double block_sum(Histogram& shared, double own) {
    for (int d = 16; d; d /= 2) own += __shfl_xor_sync(kAll, own, d);
    __syncthreads();
    if (lane() == 0) shared.sums[warp()] = own;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w];
    return sum;
}

__device__ __forceinline__ Mass block_mass(Histogram& shared, const Head& head, Mass own) {
    float top = own.top;
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, d));
    if (lane() == 0) shared.tops[warp()] = top;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.tops[w]);
    const float scaled = own.sum == 0 ? 0.0f : exp2_approx(head.reference(own.top) - head.reference(top));
    Mass all;
    all.top = top;
    all.sum = block_sum(shared, own.sum == 0 ? 0.0 : own.sum * scaled);
    return all;
}

// Sorts keys[0, count) descending by bitonic merges; `keys` has room for the next power of two.
__device__ __forceinline__ void sort_descending(u64* keys, int count) {
    int size = 2;
    while (size < count) size *= 2;
    for (int i = count + thread(); i < size; i += THREADS) keys[i] = 0;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
        for (int stride = run / 2; stride; stride /= 2) {
            for (int pair = thread(); pair < size / 2; pair += THREADS) {
                const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
                const u64 a = keys[low], b = keys[high];
                if ((a < b) == ((low & run) == 0)) keys[low] = b, keys[high] = a;
            }
            // 32 neighbouring pairs of strides up to 32 are 64 keys that no other warp touches
            const int next = stride > 1 ? stride / 2 : run;
            if (stride > 32 || next > 32)
                __syncthreads();
            else
                __syncwarp();
        }
    }
    __syncthreads();
}
