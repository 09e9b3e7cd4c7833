// The store's codec on buffers of exactly the stated size; built with sanitizers by tests/test_store.py, never part of the extension.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "../store_codec.h"

using namespace distilkernels;

// argv: the ten numbers of a layout. Encodes, decodes and compares; then decodes random bytes.
int main(int argc, char** argv) {
    if (argc != 11) return 2;
    int64_t v[10];
    for (int i = 0; i < 10; ++i) v[i] = std::atoll(argv[i + 1]);
    const RowLayout a{v[0], uint64_t(v[1]), v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9]};
    const CodeScale scale{0, 0.002};
    const float inf = std::numeric_limits<float>::infinity();
    std::mt19937_64 generator(0);
    for (int64_t n : {int64_t(1), int64_t(5)}) {
        std::vector<int32_t> ids(n * a.k), got_ids(n * a.k);
        std::vector<float> logprobs(n * a.k), got(n * a.k), tail(n, -inf), got_tail(n);
        std::vector<int64_t> codes(a.k);
        for (int64_t r = 0; r < n; ++r) {
            for (int64_t& c : codes) c = int64_t(generator() % uint64_t(a.max_code + 2));
            std::sort(codes.begin(), codes.end());
            for (int64_t j = 0; j < a.k; ++j) {
                ids[r * a.k + j] = codes[j] > a.max_code && j + 1 == a.k ? -1 : int32_t(generator() % (a.base - 1));
                logprobs[r * a.k + j] = codes[j] > a.max_code ? -inf : float(scale.hi - double(codes[j]) * scale.step);
            }
        }
        std::vector<uint8_t> rows(n * a.row_bytes + 8);
        store_encode(a, scale, n, ids.data(), logprobs.data(), tail.data(), rows.data());
        if (store_decode(a, scale, n, rows.data(), got_ids.data(), got.data(), got_tail.data()) != -1 || got_ids != ids || got != logprobs || got_tail != tail) {
            std::puts("not the same rows");
            return 1;
        }
        for (int i = 0; i < 200; ++i) {
            for (uint8_t& b : rows) b = uint8_t(i % 2 ? generator() : generator() & generator() & generator());
            store_decode(a, scale, n, rows.data(), got_ids.data(), got.data(), got_tail.data());
        }
    }
    return 0;
}
