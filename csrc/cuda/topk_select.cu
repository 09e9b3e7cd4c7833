// topk_select: one block a row, the row read once.
//
// A tile is the 8·LANES columns that LANES neighbouring lanes hold. The first pass keeps every tile's largest entry and its
// sum in shared memory. The K entries lie in the K tiles that come first by (largest entry, index), so a radix select over
// tiles leaves K of them to read again (out of the caches); the sums of all others go to the tail as they are, and so do
// the entries of reread tiles that are not taken. Entries are compared as 64-bit keys (order_key(y), ~id), which are all
// distinct: what is selected, and every order of summation, depends on the row alone.
//
// Compiled with LOGIT, ORDER, SOFTCAP, ALIGNED, LANES, THREADS and TILES, the most tiles a row may have.

#include <block.cuh>

constexpr int kTile = kVector * LANES;
constexpr int kChunk = kVector * 32;
constexpr int kMaxK = 1024;
constexpr int kCandidates = 4096;
constexpr int kUnroll = LOGIT != 0 && ALIGNED ? 4 : 2;    // chunks in flight: 64 bytes a lane, fewer where a lane needs more registers
constexpr int kLow = LOGIT == 0 ? 0 : LOGIT == 1 ? 16 : 8;  // low bits of an order key that say nothing, in whole digits

struct Tiles {
    float top[TILES], sum[TILES];
};

struct Shared {
    union {
        Tiles tiles;
        u64 candidates[kCandidates];  // once the tiles are used up
    };
    Histogram histogram;
    unsigned short taken[kMaxK];
    int above[kWarps], equal[kWarps];
    int count;
};

// One chunk: eight columns a lane, `valid` of which exist. Writes its tiles; true in lanes that met a NaN.
__device__ __forceinline__ bool reduce_chunk(Tiles& tiles, const Head& head, const float (&y)[kVector], int chunk, int count, int valid) {
    float top = y[0];
#pragma unroll
    for (int j = 1; j < kVector; ++j) top = fmaxf(top, y[j]);
    // fmaxf drops a NaN beside a number; the sum keeps it
    top = fmaxf(top, -kInfinity);
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, d));
    const float reference = head.reference(top);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
        const float term = head.term(y[j], reference);
        // −∞ adds nothing, but under a softcap it would
        sum += SOFTCAP && j >= valid ? 0.0f : term;
    }
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) sum += __shfl_xor_sync(kAll, sum, d);
    const int tile = chunk * (32 / LANES) + lane() / LANES;
    if (lane() % LANES == 0 && tile < count) {
        tiles.top[tile] = top;
        tiles.sum[tile] = sum;
    }
    return sum != sum;
}

// Fills the tiles; true in some thread if the row holds a NaN.
__device__ __forceinline__ bool reduce_row(Tiles& tiles, const Head& head, const Row& row, int count) {
    const int whole = row.columns / kChunk, groups = whole / kUnroll;
    bool nan = false;
    for (int group = warp(); group < groups; group += kWarps) {
        Raw raw[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) raw[u] = load(row, (group * kUnroll + u) * kChunk + lane() * kVector);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float y[kVector];
            unpack(row, raw[u], y);
            nan |= reduce_chunk(tiles, head, y, group * kUnroll + u, count, kVector);
        }
    }
    for (int chunk = groups * kUnroll + warp(); chunk * kChunk < row.columns; chunk += kWarps) {
        const int first = chunk * kChunk + lane() * kVector;
        float y[kVector];
        read(row, first, y);
        nan |= reduce_chunk(tiles, head, y, chunk, count, row.columns - first);
    }
    return nan;
}

// The order key of the K-th tile without its kLow low bits, and how many tiles of that key are taken.
__device__ __forceinline__ u32 select_tiles(Shared& shared, int count, int k, int* ties) {
    u32 prefix = 0;
    int need = k;
    for (int shift = 24; shift >= kLow; shift -= 8) {
        clear(shared.histogram);
        for (int base = 0; base < count; base += THREADS) {
            const int tile = base + thread();
            const u32 key = tile < count ? order_key(shared.tiles.top[tile]) : 0;
            const bool counts = tile < count && (shift == 24 || key >> (shift + 8) == prefix);
            count_digit(shared.histogram, counts, key >> shift & 255);
        }
        find(shared.histogram, need);
        prefix = prefix << 8 | (u32)shared.histogram.digit;
        need -= shared.histogram.above;
    }
    *ties = need;
    return prefix;
}

// Lists the taken tiles by index, and returns this thread's share of the mass of the others.
__device__ __forceinline__ Mass list_tiles(Shared& shared, const Head& head, int count, u32 threshold, int ties) {
    const int span = (count + 32 * kWarps - 1) / (32 * kWarps) * 32, start = warp() * span;
    const u32 before = (1u << lane()) - 1;
    int above = 0, equal = 0;
    for (int base = start; base < start + span; base += 32) {
        const int tile = base + lane();
        const u32 key = tile < count ? order_key(shared.tiles.top[tile]) >> kLow : 0;
        above += __popc(__ballot_sync(kAll, tile < count && key > threshold));
        equal += __popc(__ballot_sync(kAll, tile < count && key == threshold));
    }
    if (lane() == 0) shared.above[warp()] = above, shared.equal[warp()] = equal;
    __syncthreads();
    above = equal = 0;
    for (int w = 0; w < warp(); ++w) above += shared.above[w], equal += shared.equal[w];
    Mass rest;
    for (int base = start; base < start + span; base += 32) {
        const int tile = base + lane();
        const u32 key = tile < count ? order_key(shared.tiles.top[tile]) >> kLow : 0;
        const u32 larger = __ballot_sync(kAll, tile < count && key > threshold), same = __ballot_sync(kAll, tile < count && key == threshold);
        const int rank = equal + __popc(same & before);
        if (larger >> lane() & 1 || (same >> lane() & 1 && rank < ties))
            shared.taken[above + __popc(larger & before) + (rank < ties ? rank : ties)] = (unsigned short)tile;
        else if (tile < count)
            rest.add(head, shared.tiles.top[tile], shared.tiles.sum[tile]);
        above += __popc(larger);
        equal += __popc(same);
    }
    return rest;
}

__device__ __forceinline__ u64 entry_key(float y, int column) { return (u64)order_key(y) << 32 | (u32)~column; }

// The unit-th eight columns of the taken tiles, from column *first on; returns how many there are up to the end of the row.
__device__ __forceinline__ int read_unit(const Shared& shared, const Row& row, int unit, int units, int* first, float (&y)[kVector]) {
    if (unit >= units) return 0;
    *first = shared.taken[unit / LANES] * kTile + unit % LANES * kVector;
    if (*first >= row.columns) return 0;
    read(row, *first, y);
    return row.columns - *first;
}

// Entries of the taken tiles from `bound` on become candidates, counted in shared.count whether they fit or not; the others are added to `rest`.
__device__ __forceinline__ void collect(Shared& shared, const Head& head, const Row& row, int units, u64 bound, Mass& rest) {
    for (int unit = thread(); unit < units; unit += THREADS) {
        int first;
        float y[kVector];
        const int valid = read_unit(shared, row, unit, units, &first, y);
        float top = -kInfinity;
        u32 low = 0;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            if (j >= valid) continue;
            const u64 key = entry_key(y[j], first + j);
            if (key >= bound) {
                const int slot = atomicAdd(&shared.count, 1);
                if (slot < kCandidates) shared.candidates[slot] = key;
            } else {
                low |= 1u << j;
                top = fmaxf(top, y[j]);
            }
        }
        const float reference = head.reference(top);
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (low >> j & 1) sum += head.term(y[j], reference);
        rest.add(head, top, sum);
    }
}

// A bound that no more than kCandidates entries of the taken tiles reach, K of them at least: digits of the K-th key, the highest first.
__device__ __forceinline__ u64 narrowed(Shared& shared, const Row& row, int units, int k) {
    u64 prefix = 0;
    int need = k, shift = 64;
    do {
        shift -= 8;
        clear(shared.histogram);
        for (int base = 0; base < units; base += THREADS) {
            int first;
            float y[kVector];
            const int valid = read_unit(shared, row, base + thread(), units, &first, y);
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                const u64 key = j < valid ? entry_key(y[j], first + j) : 0;
                count_digit(shared.histogram, j < valid && (shift == 56 || key >> (shift + 8) == prefix), (u32)(key >> shift) & 255);
            }
        }
        find(shared.histogram, need);
        prefix = prefix << 8 | (u32)shared.histogram.digit;
        need -= shared.histogram.above;
    } while (k - need + shared.histogram.within > kCandidates);
    return prefix << shift;
}

// logits [outer, inner, V] of rows that start outer_stride and inner_stride entries apart; `columns` of V take part.
// values [N, K] float, ids [N, K] int, lse and tail_lse [N] double. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
topk_select(const char* logits, long long inner, long long outer_stride, long long inner_stride, long long columns, long long k,
            double slope, double cap, float* values, int* ids, double* lse, double* tail_lse) {
    __shared__ Shared shared;
    const long long n = blockIdx.x;
    const Row row{logits + (n / inner * outer_stride + n % inner * inner_stride) * kBytes, (int)columns};
    const Head head(slope, cap);
    const int count = (row.columns + kTile - 1) / kTile, needed = (int)k;

    if (__syncthreads_or(reduce_row(shared.tiles, head, row, count))) {
        const float nan = __uint_as_float(0x7fc00000u);
        for (int i = thread(); i < needed; i += THREADS) values[n * k + i] = nan, ids[n * k + i] = i;
        if (thread() == 0) lse[n] = tail_lse[n] = nan;
        return;
    }

    u32 threshold = 0;
    int ties = 0;
    if (count > needed) threshold = select_tiles(shared, count, needed, &ties);
    const Mass others = list_tiles(shared, head, count, threshold, ties);
    const int units = (count < needed ? count : needed) * LANES;

    Mass rest = others;
    if (thread() == 0) shared.count = 0;
    __syncthreads();
    collect(shared, head, row, units, (u64)threshold << (32 + kLow), rest);
    __syncthreads();
    if (shared.count > kCandidates) {
        rest = others;
        const u64 bound = narrowed(shared, row, units, needed);
        if (thread() == 0) shared.count = 0;
        __syncthreads();
        collect(shared, head, row, units, bound, rest);
        __syncthreads();
    }
    const int candidates = shared.count;
    sort_descending(shared.candidates, candidates);

    const double best = head.z(from_order_key((u32)(shared.candidates[0] >> 32)));
    double share = 0;
    for (int i = thread(); i < candidates; i += THREADS) {
        const u64 key = shared.candidates[i];
        const float y = from_order_key((u32)(key >> 32));
        if (i < needed) {
            const double z = head.z(y);
            values[n * k + i] = (float)z;
            ids[n * k + i] = (int)~(u32)key;
            share += exp(z - best);
        } else {
            rest.add(head, y, head.term(y, head.reference(y)));
        }
    }
    share = block_sum(shared.histogram, share);
    const Mass tail = block_mass(shared.histogram, head, rest);
    if (thread() == 0) {
        const double z = tail.sum == 0 ? -kInfinity : head.unit() * (head.reference(tail.top) + log2(tail.sum));
        tail_lse[n] = z;
        // ±∞ at the top: e^(z − best) is not a number there
        lse[n] = fabs(best) < kInfinity ? best + log(share + exp(z - best)) : best;
    }
}
