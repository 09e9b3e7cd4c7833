// Instruction sets a kernel is compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace distilkernels {

// Each works on items [begin, end): rows, the pairs of gather_dot_weight_grad or kv_align, or heads of a cache.
struct Kernels {
    void (*vocab_stats)(const VocabStats&, Scratch&, int64_t begin, int64_t end);
    void (*vocab_stats_backward)(const VocabStatsBackward&, Scratch&, int64_t begin, int64_t end);
    void (*pair_stats)(const PairStats&, Scratch&, int64_t begin, int64_t end);
    void (*pair_stats_backward)(const PairStatsBackward&, Scratch&, int64_t begin, int64_t end);
    void (*gather_dot)(const GatherDot&, Scratch&, int64_t begin, int64_t end);
    void (*gather_dot_hidden_grad)(const GatherDotHiddenGrad&, Scratch&, int64_t begin, int64_t end);
    void (*gather_dot_weight_grad)(const GatherDotWeightGrad&, Scratch&, int64_t begin, int64_t end);
    void (*topk_select)(const TopkSelect&, Scratch&, int64_t begin, int64_t end);
    void (*draw_rows)(const DrawRows&, Scratch&, int64_t begin, int64_t end);
    void (*filter_rows)(const FilterRows&, Scratch&, int64_t begin, int64_t end);
    void (*sample_rows)(const SampleRows&, Scratch&, int64_t begin, int64_t end);
    void (*weigh_rows)(const WeighRows&, Scratch&, int64_t begin, int64_t end);
    void (*window_importance)(const WindowImportance&, Scratch&, int64_t begin, int64_t end);
    void (*key_redundancy)(const KeyRedundancy&, Scratch&, int64_t begin, int64_t end);
    void (*kv_gather)(const KvGather&, Scratch&, int64_t begin, int64_t end);
    void (*kv_align)(const KvAlign&, Scratch&, int64_t begin, int64_t end);
    void (*recurrence_update)(const RecurrenceUpdate&, Scratch&, int64_t begin, int64_t end);
};

namespace baseline {
extern const Kernels kernels;
}

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif

const Kernels& kernels();
std::string isa();
bool set_isa(const std::string& name);  // false if this machine does not have it
std::vector<std::string> available_isas();  // best first

}  // namespace distilkernels
