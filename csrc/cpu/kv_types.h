// Arguments of the kernels on caches. Included by types.h.
#pragma once

namespace distilkernels {

// [batch, heads, length, width] with last stride 1.
struct Cache {
    DType dtype;
    void* data;
    int64_t batch, heads, length, width, batch_stride, head_stride, stride;

    int64_t count() const { return batch * heads; }
    template <class T>
    T* row(int64_t b, int64_t h, int64_t t) const {
        return static_cast<T*>(data) + b * batch_stride + h * head_stride + t * stride;
    }
};

// Entries [start[b], stop[b]) of request b whose mask, if there is one, is not 0. mask [batch, length].
struct Counted {
    const int32_t *start, *stop;
    const uint8_t* mask;

    // their positions, ascending
    int64_t list(int64_t b, int64_t length, int32_t* to) const {
        int64_t n = 0;
        for (int32_t t = start[b]; t < stop[b]; ++t)
            if (!mask || mask[b * length + t]) to[n++] = t;
        return n;
    }
};

// Carves a thread's working memory into arrays; with a null base it only counts the bytes.
class Carver {
public:
    explicit Carver(unsigned char* base) : base_(base) {}
    template <class T>
    T* take(int64_t count) {
        T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return at;
    }
    size_t used() const { return used_; }

private:
    unsigned char* base_;
    size_t used_ = 0;
};

constexpr int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The most of any instruction set: floats in a vector, and columns that are multiplied together.
constexpr int64_t kMostWidth = 16, kMostColumns = 64;
constexpr int64_t padded(int64_t width) { return up_to(width, kMostWidth); }

// Null outputs were not asked for; `last` and `cosine` come together.
struct KeyRedundancy {
    Cache keys;
    Counted counted;
    double threshold;
    float* similarity;
    int32_t* last;
    float* cosine;

    int64_t items() const { return keys.count(); }
    int64_t numbers() const { return items() * keys.length * keys.width; }
    size_t workspace() const;
};

// What one head needs. Index c is that of the c-th key that counts.
struct RedundancySpace {
    int32_t* position;
    float *inverse, *self;  // 1/(|k| + ε) and |k̂|²
    float *direction, *block;
    double* total;
    // of the neighbours: k̂ in float; in bytes with scale and the norm of what that loses; keys without a neighbour yet, and with one
    float *unit, *panel, *products;
    uint8_t* bytes;
    float *byte_scale, *byte_error;
    int32_t *found, *open, *closed;
    size_t used;

    RedundancySpace(const KeyRedundancy& a, unsigned char* base) {
        Carver carve(base);
        const int64_t n = a.keys.length, width = padded(a.keys.width);
        position = carve.take<int32_t>(n);
        inverse = carve.take<float>(n);
        self = carve.take<float>(n);
        direction = carve.take<float>(width);
        block = carve.take<float>(width);
        total = carve.take<double>(width);
        const int64_t m = a.last ? n : 0;
        unit = carve.take<float>(m * width);
        panel = carve.take<float>(kMostColumns * (width + 3));
        products = carve.take<float>(kMostColumns * 8);
        bytes = carve.take<uint8_t>(m * width);
        byte_scale = carve.take<float>(m);
        byte_error = carve.take<float>(m);
        found = carve.take<int32_t>(m);
        open = carve.take<int32_t>(m);
        closed = carve.take<int32_t>(m);
        used = carve.used();
    }
};

inline size_t KeyRedundancy::workspace() const { return RedundancySpace(*this, nullptr).used; }

enum class GroupReduce : int { max_logits, max_probs, mean_probs, none };
enum class WindowReduce : int { mean, sum, max };

struct WindowImportance {
    Cache queries, keys;
    Counted counted;
    const uint8_t* query_mask;
    double scale;
    GroupReduce group_reduce;
    WindowReduce window_reduce;
    bool causal;
    const float* lse;
    float* out;
    KeyRedundancy sums;  // of the same keys, where its `similarity` is not null

    int64_t items() const { return keys.count(); }
    int64_t numbers() const { return items() * keys.length * keys.width; }
    int64_t groups() const { return queries.heads / keys.heads; }
    size_t workspace() const;

    // Probabilities of a chunk of queries stay in memory until their sums are known: few enough to stay in a core's share of
    // the cache, and no fewer than make good use of a key that has been read. So it depends on T: more queries than a chunk has are
    // summed chunk by chunk, and padding can change the last bits of their sum.
    int64_t chunk() const {
        const int64_t lanes = group_reduce == GroupReduce::max_logits ? 1 : groups();
        const int64_t held = lse ? kMostLanes : kHeld / std::max<int64_t>(1, keys.length * lanes);
        return std::max<int64_t>(1, std::min({queries.length, held, kMostLanes / groups()}));
    }

private:
    static constexpr int64_t kHeld = 1 << 20;  // floats
    static constexpr int64_t kMostLanes = 512;
};

// What one head needs. A tile is kTile keys; a lane is a row of probabilities, of one query or of one query and head.
struct ImportanceSpace {
    static constexpr int64_t kTile = 48;
    int32_t *position, *query;
    float *packed, *widened, *products, *exps, *tile_ref, *ref, *sum, *lost;
    int64_t row_stride, lane_stride;
    size_t used;

    ImportanceSpace(const WindowImportance& a, unsigned char* base) {
        Carver carve(base);
        const int64_t rows = a.chunk() * a.groups(), lanes = a.group_reduce == GroupReduce::max_logits ? a.chunk() : rows;
        row_stride = padded(rows);
        lane_stride = padded(lanes);
        const int64_t tiles = a.lse ? 1 : a.keys.length / kTile + 1;
        position = carve.take<int32_t>(a.keys.length);
        query = carve.take<int32_t>(a.queries.length);
        packed = carve.take<float>(a.keys.width * row_stride);
        widened = carve.take<float>(kTile * padded(a.keys.width));
        // a vector is read from any lane on, past the end of the last row too
        products = carve.take<float>(kTile * row_stride + kMostWidth);
        exps = carve.take<float>(tiles * kTile * lane_stride + kMostWidth);
        tile_ref = carve.take<float>(tiles * lane_stride + kMostWidth);
        for (float** v : {&ref, &sum, &lost}) *v = carve.take<float>(lane_stride + kMostWidth);
        used = carve.used();
    }
};

inline size_t WindowImportance::workspace() const {
    return std::max(ImportanceSpace(*this, nullptr).used, sums.similarity ? sums.workspace() : 0);
}

// cos and sin [rows, width / 2] of positions; source and target [batch, heads, slots], target null for position 0.
struct Rotation {
    const float *cos, *sin;
    const int32_t *source, *target;
    int64_t rows, width;
    bool interleaved;
};

// indices [batch, heads, out.length]; the outputs may be the first slots of the inputs where indices ascend. cos null: no rotation.
struct KvGather {
    Cache keys, values;
    const int32_t* indices;
    Rotation rotation;
    Cache out_keys, out_values;

    int64_t items() const { return out_keys.count(); }
    int64_t numbers() const { return items() * out_keys.length * (out_keys.width + out_values.width); }
    size_t workspace() const { return 0; }
};

enum class Loss : int { mse, l1, smooth_l1, cosine };
enum class Normalize : int { none, layer_std, inputs };

// One pair of the alignment loss; mask [batch, heads, length] with its own strides, or null. grad is contiguous, or null.
struct AlignPair {
    Cache student, teacher;
    const uint8_t* mask;
    int64_t mask_strides[3];
    void* grad;

    bool real(int64_t b, int64_t h, int64_t m) const { return !mask || mask[b * mask_strides[0] + h * mask_strides[1] + m * mask_strides[2]]; }
};

struct KvAlign {
    std::vector<AlignPair> pairs;
    Loss loss;
    double beta;
    Normalize normalize;
    const double* coef;
    double* sums;

    int64_t items() const { return pairs.size(); }
    int64_t numbers() const {
        int64_t sum = 0;
        for (const AlignPair& p : pairs) sum += p.student.count() * p.student.length * p.student.width;
        return sum;
    }
    int64_t widest() const {
        int64_t width = 0;
        for (const AlignPair& p : pairs) width = std::max(width, p.student.width);
        return width;
    }
    size_t workspace() const { return 3 * up_to(widest() + 16, 16) * sizeof(float); }
};

// attention [batch, query heads, steps, length]; the state [batch, heads, length], whose rows have these strides.
struct RecurrenceUpdate {
    Cache attention;
    int64_t heads, first_step;
    double alpha;
    int32_t *last_seen, *max_interval;
    int64_t last_strides[2], interval_strides[2];

    int64_t items() const { return attention.batch * heads; }
    int64_t numbers() const { return attention.count() * attention.length * attention.width; }
    size_t workspace() const { return 0; }
};

}  // namespace distilkernels
