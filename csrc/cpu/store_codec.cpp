// Serial on purpose: it runs in data-loader workers, and a process forked from one that used OpenMP must not enter it.
#include "store_codec.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the store codec reads and writes little-endian words in place"
#endif

namespace distilkernels {
namespace {

uint64_t load(const uint8_t* p) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    return word;
}

// `width` ≤ 57 bits from bit `at` on.
uint64_t bits(const uint8_t* p, int64_t at, uint64_t mask) { return (load(p + (at >> 3)) >> (at & 7)) & mask; }

void put_bits(uint8_t* p, int64_t at, uint64_t value) {
    const uint64_t word = load(p + (at >> 3)) | value << (at & 7);
    std::memcpy(p + (at >> 3), &word, 8);
}

uint64_t mask_of(int64_t width) { return (uint64_t(1) << width) - 1; }

struct Quotient {
    uint64_t quotient, remainder;
};

// x / base by a multiplication; reciprocal = ⌊(2^64 − 1)/base⌋ makes the quotient right or one too small.
Quotient divided(uint64_t x, uint64_t base, uint64_t reciprocal) {
    uint64_t q = uint64_t((static_cast<unsigned __int128>(x) * reciprocal) >> 64);
    uint64_t r = x - q * base;
    if (r >= base) ++q, r -= base;
    return {q, r};
}

// Digits of all groups; false if a number has more digits than its group.
template <int kGroup>
bool decode_ids(const RowLayout& a, const uint8_t* p, int32_t* ids) {
    const uint64_t mask = mask_of(a.group_bits), reciprocal = ~uint64_t(0) / a.base;
    const int32_t empty = int32_t(a.base - 1);
    const int64_t group = kGroup ? kGroup : a.group;
    uint64_t excess = 0;
    auto digits = [&](uint64_t x, int32_t* out, int64_t count) {
        for (int64_t i = 0; i + 1 < count; ++i) {
            const Quotient d = divided(x, a.base, reciprocal);
            out[i] = int32_t(d.remainder) == empty ? -1 : int32_t(d.remainder);
            x = d.quotient;
        }
        excess |= x >= a.base;
        out[count - 1] = int32_t(x) == empty ? -1 : int32_t(x);
    };
    int64_t at = 0, slot = 0;
    for (; slot + group <= a.k; slot += group, at += a.group_bits) digits(bits(p, at, mask), ids + slot, group);
    // the last group's number may be shorter than the mask: what follows it is padding up to the byte, then other parts
    if (slot < a.k) {
        const int64_t rest = (a.low_start - 4) * 8 - at;
        digits(bits(p, at, mask_of(rest < a.group_bits ? rest : a.group_bits)), ids + slot, a.k - slot);
    }
    return !excess;
}

// Positions of the set bits: slot j's is (code_j >> low_bits) + j. False if there are not K of them; high has room for K + 64.
bool decode_high(const RowLayout& a, const uint8_t* p, int32_t* high) {
    int64_t slot = 0;
    for (int64_t at = 0; at < a.high_bits; at += 64) {
        uint64_t word = load(p + (at >> 3));
        if (a.high_bits - at < 64) word &= mask_of(a.high_bits - at);
        for (; word; word &= word - 1, ++slot) high[slot] = int32_t(at + __builtin_ctzll(word) - slot);
        if (slot > a.k) return false;
    }
    return slot == a.k;
}

}  // namespace

void store_encode(const RowLayout& a, CodeScale scale, int64_t n, const int32_t* ids, const float* logprobs, const float* tail, uint8_t* rows) {
    const uint64_t low_mask = mask_of(a.low_bits);
    for (int64_t r = 0; r < n; ++r, ids += a.k, logprobs += a.k, rows += a.row_bytes) {
        std::memcpy(rows, tail + r, 4);
        int64_t at = 0;
        for (int64_t slot = 0; slot < a.k; slot += a.group, at += a.group_bits) {
            uint64_t number = 0;
            for (int64_t i = (slot + a.group < a.k ? slot + a.group : a.k) - 1; i >= slot; --i)
                number = number * a.base + (ids[i] < 0 ? a.base - 1 : uint64_t(ids[i]));
            put_bits(rows + 4, at, number);
        }
        for (int64_t slot = 0; slot < a.k; ++slot) {
            const bool finite = logprobs[slot] > -std::numeric_limits<float>::infinity();
            const int64_t code = finite ? int64_t((scale.hi - double(logprobs[slot])) / scale.step + 0.5) : a.max_code + 1;
            put_bits(rows + a.low_start, slot * a.low_bits, uint64_t(code) & low_mask);
            const int64_t high = (code >> a.low_bits) + slot;
            rows[a.high_start + (high >> 3)] |= uint8_t(1u << (high & 7));
        }
    }
}

int64_t store_decode(const RowLayout& a, CodeScale scale, int64_t n, const uint8_t* rows, int32_t* ids, float* logprobs, float* tail) {
    const uint64_t low_mask = mask_of(a.low_bits);
    const int32_t max_code = int32_t(a.max_code);
    std::vector<int32_t> code_slots(a.k + 64);
    int32_t* codes = code_slots.data();
    for (int64_t r = 0; r < n; ++r, ids += a.k, logprobs += a.k, rows += a.row_bytes) {
        std::memcpy(tail + r, rows, 4);
        const bool digits = a.group == 1 ? decode_ids<1>(a, rows + 4, ids) : a.group == 3 ? decode_ids<3>(a, rows + 4, ids) : decode_ids<0>(a, rows + 4, ids);
        if (!digits || !decode_high(a, rows + a.high_start, codes)) return r;
        const uint8_t* low = rows + a.low_start;
        for (int64_t slot = 0; slot < a.k; ++slot) codes[slot] = codes[slot] << a.low_bits | int32_t(bits(low, slot * a.low_bits, low_mask));
        int32_t largest = 0;
        for (int64_t slot = 0; slot < a.k; ++slot) {
            const float value = float(scale.hi - double(codes[slot]) * scale.step);
            logprobs[slot] = codes[slot] > max_code ? -std::numeric_limits<float>::infinity() : value;
            largest = codes[slot] > largest ? codes[slot] : largest;
        }
        if (largest > max_code + 1) return r;
    }
    return -1;
}

}  // namespace distilkernels
