// The kernel as a program: logits on standard input, results on standard output.
// Arguments: rows, inner, outer_stride, inner_stride, columns, k, slope, cap, seed, and how many bytes off a 16-byte boundary the logits start.

#include "cuda_on_cpu.h"
//
#include "topk_select.cu"

int main(int, char** argv) {
    const long long rows = std::atoll(argv[1]), inner = std::atoll(argv[2]), outer_stride = std::atoll(argv[3]), inner_stride = std::atoll(argv[4]);
    const long long columns = std::atoll(argv[5]), k = std::atoll(argv[6]);
    const double slope = std::atof(argv[7]), cap = std::atof(argv[8]);
    const size_t offset = std::atoll(argv[10]);

    std::vector<char> input;
    char piece[1 << 16];
    for (size_t got; (got = std::fread(piece, 1, sizeof piece, stdin));) input.insert(input.end(), piece, piece + got);
    // whole 16-byte granules and not a byte more, as far as address sanitizer is concerned
    char* memory = (char*)std::aligned_alloc(16, (offset + input.size() + 15) / 16 * 16);
    std::memcpy(memory + offset, input.data(), input.size());

    std::vector<float> values(rows * k, 12345.0f);
    std::vector<int> ids(rows * k, -7);
    std::vector<double> lse(rows, 12345.0), tail(rows, 12345.0);
    cuda_on_cpu::launch((unsigned)rows, THREADS, std::strtoull(argv[9], nullptr, 10), [&] {
        topk_select(memory + offset, inner, outer_stride, inner_stride, columns, k, slope, cap, values.data(), ids.data(), lse.data(), tail.data());
    });
    std::fwrite(values.data(), sizeof(float), values.size(), stdout);
    std::fwrite(ids.data(), sizeof(int), ids.size(), stdout);
    std::fwrite(lse.data(), sizeof(double), lse.size(), stdout);
    std::fwrite(tail.data(), sizeof(double), tail.size(), stdout);
    std::free(memory);
    return 0;
}
