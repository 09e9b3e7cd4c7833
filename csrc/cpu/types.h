// Arguments of the kernels: raw pointers, sizes and strides. Included before any ISA pragma, so all of this is baseline code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
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

constexpr size_t itemsize(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

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
    double *lse, *tail_lse, *expected_logit, *logit_sum, *lse_t1, *max, *second;
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

// What the second look at both rows is for.
enum class Second : int { none, mixture, power, distance, balance };

// out [N, 11]: lse, teacher_lse, teacher_gap, student_gap, expected_logit, teacher_expected_logit, lse_t1 (lse itself unless
// `with_t1`), and of the second look, `w` [N], teacher_to_mixture, student_to_mixture, Σ p·r, Σ q·r; or Σ w·p + (1 − w)·q −
// p^w·q^{1−w}; or Σ |p − q|, 0, 0, Σ q·sign(q − p); or Σ (p − q)·log(p/q), 0, 0, Σ q·r·log(q/p), r = q/(p + q). What is not asked for
// is zero.
// Both sides are double or neither is; their rows may be split differently, `head.columns` holds for both.
struct PairStats {
    DType dtype, teacher_dtype;
    Rows logits, teacher;
    Head head, teacher_head;
    bool with_t1;
    Second second;
    const double* w;
    double* out;

    int64_t items() const { return logits.count(); }
    int64_t numbers() const { return 2 * items() * logits.vocab; }
};

// coef [N, 12]: lse, teacher_lse, A, B, C, D, E, lse_t1, F, G, H, w.
struct PairStatsBackward {
    DType dtype, teacher_dtype;
    Rows logits, teacher;
    const double* coef;
    bool with_t1;
    Second second;
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

// The k largest of each row. values [N, k] is double for double logits, else float; ids [N, k].
struct TopkSelect {
    DType dtype;
    Rows logits;
    Head head;
    int64_t k;
    void* values;
    int32_t* ids;
    double *lse, *tail_lse;

    int64_t items() const { return logits.count(); }
    int64_t numbers() const { return items() * logits.vocab; }

    // Columns that are summed, and read again, together: few enough that eight lanes of each are 1.5 k in all, or the largest
    // entries of lanes would bound nothing; a tile costs as much as 100 entries, so no fewer than that takes.
    int64_t tile() const {
        int64_t columns = 512;
        while (columns > 64 && 3 * k * columns > 16 * head.columns) columns /= 2;
        return columns;
    }
    int64_t tiles() const { return (head.columns + tile() - 1) / tile(); }
    // Candidates that are held before all but k are dropped.
    int64_t capacity() const { return 4 * k + 256; }
};

// `draws` ids of each row from the softmax of tau·z; seeds and positions [N], values as for TopkSelect.
struct DrawRows {
    DType dtype;
    Rows logits;
    Head head;
    double tau;
    const int64_t *seeds, *positions;
    int64_t draws;
    int32_t* ids;
    void* values;
    double *lse, *lse_tau;

    static constexpr int64_t kTile = 256;

    int64_t items() const { return logits.count(); }
    int64_t numbers() const { return items() * logits.vocab; }
    int64_t tiles() const { return (head.columns + kTile - 1) / kTile; }
};

// What a row is filtered by, [N]: temperature 0 is the argmax; top_k 0, top_p ≥ 1 and min_p 0 are off. bar [N] is double for double
// logits, else float.
struct FilterRows {
    DType dtype;
    Rows logits;
    int64_t columns;
    const double* temperature;
    const int64_t* top_k;
    const double *top_p, *min_p;
    void* bar;
    double *lse, *lse_all, *expected;
    int64_t* argmax;
    const int64_t* rows = nullptr;  // which rows of logits, [N]; null for all
    int64_t count = 0;              // N

    // Columns whose largest entries, one a lane, bound the top_k-th and tell which columns are read again.
    static constexpr int64_t kTile = 512;

    int64_t items() const { return count; }
    int64_t numbers() const { return items() * logits.vocab; }
    int64_t tiles() const { return (columns + kTile - 1) / kTile; }
};

// Filtered softmaxes of `rows` [R] of logits, −1 for none; the law's fields are [R], its bar as above.
struct FilteredRows {
    DType dtype;
    Rows logits;
    const int64_t* rows;
    const double* temperature;
    const void* bar;
    const double* lse;
    const int64_t* argmax;
};

enum class Mode : int { plain, residual, gate };

// The weights of R draws; no `second` in a plain one, `scale` [R] only in a residual.
struct DrawWeights {
    Mode mode;
    FilteredRows first, second;
    const double* scale;
    int64_t count, columns;

    int64_t items() const { return count; }
    int64_t numbers() const { return count * columns; }
};

struct WeighRows : DrawWeights {
    double* out;
};

// streams [R], or null and `stream` for all. value [R] is double for double logits, else float.
struct SampleRows : DrawWeights {
    int64_t vocab;
    const int64_t *seeds, *positions, *offsets, *streams;
    int64_t stream;
    int64_t* token;
    void* value;
    int64_t* rank;
    bool* compared;
};

}  // namespace distilkernels

#include "kv_types.h"

namespace distilkernels {

// Memory that nobody has written, whole cache lines: its pages cost nothing before they are used. A copy is another of the same size.
class Unwritten {
public:
    explicit Unwritten(size_t size = 0) : size_(size), data_(size ? static_cast<unsigned char*>(operator new(size, kLine)) : nullptr) {}
    Unwritten(const Unwritten& other) : Unwritten(other.size_) {}
    Unwritten(Unwritten&&) = default;
    Unwritten& operator=(Unwritten&&) = default;
    unsigned char* data() const { return data_.get(); }

private:
    static constexpr std::align_val_t kLine{64};
    struct Delete {
        void operator()(unsigned char* data) const { operator delete(data, kLine); }
    };
    size_t size_;
    std::unique_ptr<unsigned char, Delete> data_;
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
    struct Ranked {
        uint64_t key;
        int64_t id;
    };
    std::vector<Ranked> ranked, ranked_aside;
    std::vector<int64_t> candidates;             // ids
    std::vector<double> tile_sums, tile_refs;    // Σ e^{z − ref} of a tile
    Unwritten entries;                           // three rows of columns and a block
    size_t entries_stride = 0;
    Unwritten space;                             // of the kernels on caches

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

    explicit Scratch(const TopkSelect& a) : Scratch(std::max(a.tiles() * kMostLanes, a.capacity())) {
        hidden.resize(a.logits.vocab / 64 + 1);
        for (auto* v : {&ranked, &ranked_aside}) v->resize(a.k);
        candidates.resize(a.capacity());
        ids.resize(a.k);
        z.resize(a.k);
        for (auto* v : {&tile_sums, &tile_refs}) v->resize(a.tiles());
    }
    explicit Scratch(const DrawRows& a) : hidden(a.logits.vocab / 64 + 1) {
        bars.resize(a.draws);
        ids.resize(a.draws);
        z.resize(a.draws);
        for (auto* v : {&tile_sums, &tile_refs}) v->resize(a.tiles());
    }

    explicit Scratch(const FilterRows& a) : Scratch(a.tiles() * kMostLanes) {
        hidden.resize(a.logits.vocab / 64 + 1);
        entries_stride = ((a.columns + 2 * kMostBlock) * (a.dtype == DType::f64 ? 8 : 4) + kLine - 1) / kLine * kLine;
        entries = Unwritten(3 * entries_stride);
    }
    explicit Scratch(const WeighRows&) {}
    explicit Scratch(const SampleRows&) {}
    template <class Args, class = decltype(&Args::workspace)>
    explicit Scratch(const Args& a) : space(a.workspace()) {}

    template <class S>
    S* entries_row(int index) const {
        return reinterpret_cast<S*>(entries.data() + index * entries_stride);
    }

    template <class S>
    S* row(int index) {
        const auto data = reinterpret_cast<uintptr_t>(wide.data());
        return reinterpret_cast<S*>((data + kLine - 1) / kLine * kLine + index * ((wide.size() - kLine) / 2));
    }

private:
    static constexpr size_t kLine = 64;
    static constexpr int64_t kMostLanes = 16, kMostBlock = 64;
    // whole cache lines, and at least the vector that the last entry lies in
    explicit Scratch(int64_t columns) : wide(2 * (columns * sizeof(double) / kLine + 2) * kLine + kLine) {}
};

}  // namespace distilkernels
