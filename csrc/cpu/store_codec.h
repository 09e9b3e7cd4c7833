// Rows of the store as bytes: python/distilkernels/store/layout.py has the format, codec.py the reference.
#pragma once
#include <cstdint>

namespace distilkernels {

struct RowLayout {
    int64_t k;
    uint64_t base;  // V + 1; digit V is an empty slot
    int64_t max_code;
    int64_t group, group_bits, low_bits, high_bits, low_start, high_start, row_bytes;
};

struct CodeScale {
    double hi, step;
};

// rows: n·row_bytes zeroed bytes and 8 more that may be written with zeros.
void store_encode(const RowLayout&, CodeScale, int64_t n, const int32_t* ids, const float* logprobs, const float* tail, uint8_t* rows);

// rows: n·row_bytes bytes and 8 more that are read. Returns the first row that no encoder writes, or −1.
int64_t store_decode(const RowLayout&, CodeScale, int64_t n, const uint8_t* rows, int32_t* ids, float* logprobs, float* tail);

}  // namespace distilkernels
