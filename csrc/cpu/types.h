// Arguments of the kernels: raw pointers, sizes and strides. Included before any ISA pragma, so all of this is baseline code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace distilkernels {

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

enum class DType : int { f32, bf16, f16, f64 };

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

inline float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
    return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));
}

// Round to nearest, ties to even, as PyTorch does.
inline void narrow(double x, double& to) { to = x; }
inline void narrow(double x, float& to) { to = float(x); }
inline void narrow(double x, bf16& to) {
    const uint32_t u = bits_of(float(x));
    to.bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void narrow(double x, f16& to) {
    const uint32_t u = bits_of(float(x)), magnitude = u & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) half = 0x7e00;
    else if (magnitude >= 0x477ff000) half = 0x7c00;  // 65520 and beyond round to infinity
    else if (magnitude >= 0x38800000) half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    else half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;  // the spacing at ½ is that of the subnormals
    to.bits = uint16_t(((u >> 16) & 0x8000) | half);
}

// [outer, inner, vocab] with last stride 1; row r is (r / inner, r % inner).
struct Rows {
    void* data;
    int64_t outer, inner, vocab, outer_stride, inner_stride;

    int64_t count() const { return outer * inner; }
    template <class T>
    T* row(int64_t r) const {
        return static_cast<T*>(data) + (r / inner) * outer_stride + (r % inner) * inner_stride;
    }
};

// z = softcap·tanh(scale·x / softcap) / temperature on the first `columns` columns; softcap 0 means none.
struct Head {
    double temperature, scale, softcap;
    int64_t columns;
};

// [N, count] contiguous, int64 where `wide`, else int32; `data` null means there are none.
struct Ids {
    const void* data;
    bool wide;
    int64_t count;

    int64_t at(int64_t index) const {
        return wide ? static_cast<const int64_t*>(data)[index] : static_cast<const int32_t*>(data)[index];
    }
};

// Null outputs were not asked for. gathered, mass_above and thresholds are double for double logits, else float.
struct VocabStats {
    DType dtype;
    Rows logits;
    Ids ids;
    const void* thresholds;
    Head head;
    double *lse, *tail_lse, *expected_logit, *logit_sum, *lse_t1, *max;
    int64_t *finite_count, *argmax, *rank;
    void *gathered, *mass_above;

    int64_t items() const { return logits.count(); }
    int64_t numbers() const { return items() * logits.vocab; }
};

// coef [N, 6]: ref, A, B, C, D, lse_t1. entries [N, K], double where `wide_entries`, else float.
struct VocabStatsBackward {
    DType dtype;
    Rows logits;
    Ids ids;
    const void* entries;
    bool wide_entries;
    const double* coef;
    bool constant_or_t1;
    Head head;
    Rows out;

    int64_t items() const { return logits.count(); }
    int64_t numbers() const { return items() * logits.vocab; }
};

// Columns of pairs of rows that are worked on at once: two buffers of floats fill a third of a first-level cache.
constexpr int64_t kPiece = 2048;

constexpr int64_t kPairStats = 11;
constexpr int64_t kPairCoefficients = 12;

// out [N, 11]: lse, teacher_lse, teacher_gap, student_gap, expected_logit, teacher_expected_logit, lse_t1 (lse itself unless
// `with_t1`), teacher_to_mixture, student_to_mixture, Σ p·r, Σ q·r (zeros unless there is a `mixture`, [N]).
// Both sides are double or neither is; their rows may be split differently, `head.columns` holds for both.
struct PairStats {
    DType dtype, teacher_dtype;
    Rows logits, teacher;
    Head head, teacher_head;
    bool with_t1;
    const double* mixture;
    double* out;

    int64_t items() const { return logits.count(); }
    int64_t numbers() const { return 2 * items() * logits.vocab; }
};

// coef [N, 12]: lse, teacher_lse, A, B, C, D, E, lse_t1, F, G, H, w.
struct PairStatsBackward {
    DType dtype, teacher_dtype;
    Rows logits, teacher;
    const double* coef;
    bool with_t1, with_mixture;
    Head head, teacher_head;
    Rows out;

    int64_t items() const { return logits.count(); }
    int64_t numbers() const { return 2 * items() * logits.vocab; }
};

// [rows, columns] with last stride 1.
struct Matrix {
    DType dtype;
    void* data;
    int64_t rows, columns, stride;

    template <class T>
    T* row(int64_t r) const {
        return static_cast<T*>(data) + r * stride;
    }
};

// Rows of weight are rounded to hidden's dtype. out [N, K], like every `grad` below, is double for double operands, else float.
struct GatherDot {
    Matrix hidden, weight;
    Ids ids;
    void* out;

    int64_t items() const { return hidden.rows; }
    int64_t numbers() const { return items() * ids.count * weight.columns; }
};

// Rows of weight are rounded to `operand`; out [N, H] contiguous.
struct GatherDotHiddenGrad {
    DType operand;
    const void* grad;
    Matrix weight;
    Ids ids;
    int64_t rows;
    void* out;

    int64_t items() const { return rows; }
    int64_t numbers() const { return items() * ids.count * weight.columns; }
};

// A pair is a flat index of grad [N, slots]; targets ascend, negative ones are skipped.
struct GatherDotWeightGrad {
    const void* grad;
    int64_t slots;
    Matrix hidden;
    const int64_t *order, *targets;
    int64_t pairs;
    Matrix out;

    int64_t items() const { return pairs; }
    int64_t numbers() const { return pairs * hidden.columns; }
};

// One thread's working memory, allocated before the parallel region so that nothing throws inside it.
struct Scratch {
    struct Bar {
        double value;
        int64_t slot;
    };
    std::vector<uint64_t> hidden;  // one bit a column, all zero between rows
    std::vector<int64_t> ids;      // −1 for an empty or repeated slot
    std::vector<double> z;         // −inf for an empty slot
    std::vector<Bar> bars;
    std::vector<int64_t> counts, count_histogram;
    std::vector<double> masses, mass_histogram;
    std::vector<unsigned char> wide;  // two rows of double or float, zero beyond their columns

    Scratch(const VocabStats& a) : hidden(a.logits.vocab / 64 + 1) {
        const size_t k = a.ids.data ? a.ids.count : 0;
        ids.resize(k);
        z.resize(k);
        if (a.rank || a.mass_above) {
            bars.reserve(k);
            for (auto* v : {&counts, &count_histogram}) v->resize(k);
            for (auto* v : {&masses, &mass_histogram}) v->resize(k);
        }
    }
    explicit Scratch(const VocabStatsBackward&) {}
    explicit Scratch(const PairStats&) : Scratch(kPiece) {}
    explicit Scratch(const PairStatsBackward&) : Scratch(kPiece) {}
    explicit Scratch(const GatherDot& a) : Scratch(a.weight.columns) {}
    explicit Scratch(const GatherDotHiddenGrad& a) : Scratch(a.weight.columns) {}
    explicit Scratch(const GatherDotWeightGrad& a) : Scratch(a.hidden.columns) {}

    template <class S>
    S* row(int index) {
        const auto data = reinterpret_cast<uintptr_t>(wide.data());
        return reinterpret_cast<S*>((data + kLine - 1) / kLine * kLine + index * ((wide.size() - kLine) / 2));
    }

private:
    static constexpr size_t kLine = 64;
    // whole cache lines, and at least the vector that the last entry lies in
    explicit Scratch(int64_t columns) : wide(2 * (columns * sizeof(double) / kLine + 2) * kLine + kLine) {}
};

}  // namespace distilkernels
