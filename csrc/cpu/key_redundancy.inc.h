// Cosine sums of keys and their last neighbours; primitives/key_redundancy.py is the definition. Included inside each ISA's namespace.

// 1/(|k| + ε) and |k̂|² of each key that counts, and their sum of k̂.
template <class T>
inline void unit_sums(const KeyRedundancy& a, const RedundancySpace& s, int64_t b, int64_t h, int64_t n) {
    constexpr int64_t together = 64;  // summed in float; in double beyond
    const int64_t width = a.keys.width;
    const auto row = [&](int64_t c) { return a.keys.row<const T>(b, h, s.position[std::min(c, n - 1)]); };
    std::fill_n(s.total, width, 0.0);
    for (int64_t c = 0; c < n;) {
        std::fill_n(s.block, padded(width), 0.0f);
        for (const int64_t end = std::min(n, c + together); c < end; ++c) {
            const T* k = row(c);
            const double squares = sum_of_squares<Float>(k, width);
            // a key whose squares overflow has no direction left
            const float inverse = std::isinf(squares) ? 0 : float(1 / (std::sqrt(squares) + 1e-8));
            s.inverse[c] = inverse;
            s.self[c] = inverse > 0 ? float(squares * inverse * inverse) : 0;
            add_scaled<Float>(inverse, k, row(c + 8), s.block, width);
        }
        for (int64_t d = 0; d < width; ++d) s.total[d] += s.block[d];
    }
    for (int64_t d = 0; d < padded(width); ++d) s.direction[d] = d < width ? float(s.total[d]) : 0;
}

template <class T>
inline void cosine_sums(const KeyRedundancy& a, const RedundancySpace& s, int64_t b, int64_t h, int64_t n) {
    float* out = a.similarity + (b * a.keys.heads + h) * a.keys.length;
    std::fill_n(out, a.keys.length, 0.0f);
    for (int64_t c = 0; c < n; ++c) {
        const T* k = a.keys.row<const T>(b, h, s.position[c]);
        const T* later = a.keys.row<const T>(b, h, s.position[std::min(c + 8, n - 1)]);
        out[s.position[c]] = s.inverse[c] * dot<Float>(s.direction, k, later, a.keys.width) - s.self[c];
    }
}

// The neighbours of one head, among the n keys that count.
struct Neighbours {
    const KeyRedundancy& a;
    const RedundancySpace& s;
    int64_t n;

    float cosine(int64_t i, int64_t j) const {
        const float* other = s.unit + j * padded(a.keys.width);
        return dot<Float>(s.unit + i * padded(a.keys.width), other, other, a.keys.width);
    }

    // Looks for the highest of the panel's `count` ascending ids that is later (or earlier) than each open key and near it.
    void scan(const int32_t* ids, int64_t count, int32_t* open, int64_t rows, bool later) const {
        pack_panel(s, ids, count, a.keys.width);
        const uint64_t all = count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
        for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
            int32_t six[kRowsAtOnce];
            uint64_t near[kRowsAtOnce];
            for (int i = 0; i < kRowsAtOnce; ++i) six[i] = open[std::min(r + i, rows - 1)];
            near_of_six(s, six, a.keys.width, float(a.threshold), near);
            for (int i = 0; i < kRowsAtOnce && r + i < rows; ++i) {
                uint64_t bits = near[i] & all;
                if (bits) bits &= allowed(ids, count, six[i], later);
                for (; bits; bits ^= uint64_t(1) << (63 - __builtin_clzll(bits))) {
                    const int32_t id = ids[63 - __builtin_clzll(bits)];
                    if (cosine(six[i], id) > float(a.threshold)) {
                        s.found[six[i]] = id;
                        break;
                    }
                }
            }
        }
    }

    // Two scans from the end. First every key without a neighbour yet is compared with the keys after it. One that is still
    // without has been compared, in that, with all earlier ones that are without: what is left is those that have one.
    void find() const {
        constexpr int64_t columns = kColumns<Float>;
        int32_t ids[columns];
        int64_t open = 0, closed = 0;
        for (int64_t i = 0; i < n; ++i) {
            s.found[i] = -1;
            s.open[open++] = int32_t(i);
        }
        for (int64_t end = n; end > 0; end = end - std::min(columns, end)) {
            const int64_t count = std::min(columns, end);
            for (int64_t c = 0; c < count; ++c) ids[c] = int32_t(end - count + c);
            scan(ids, count, s.open, std::lower_bound(s.open, s.open + open, int32_t(end - 1)) - s.open, true);
            open = drop_found(open);
        }
        for (int64_t i = 0; i < n; ++i)
            if (s.found[i] >= 0) s.closed[closed++] = int32_t(i);
        for (int64_t end = closed; end > 0 && open > 0; end = end - std::min(columns, end)) {
            const int64_t count = std::min(columns, end);
            const int32_t* panel = s.closed + end - count;
            int32_t* rows = std::upper_bound(s.open, s.open + open, panel[0]);
            scan(panel, count, rows, s.open + open - rows, false);
            open = drop_found(open);
        }
    }

private:
    static uint64_t allowed(const int32_t* ids, int64_t count, int32_t own, bool later) {
        const int64_t below = std::lower_bound(ids, ids + count, own) - ids, same = below < count && ids[below] == own;
        const auto first = [](int64_t bits) { return bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1; };
        return later ? ~first(below + same) : first(below);
    }
    int64_t drop_found(int64_t open) const {
        return std::remove_if(s.open, s.open + open, [&](int32_t i) { return s.found[i] >= 0; }) - s.open;
    }
};

template <class T>
inline void last_neighbours(const KeyRedundancy& a, const RedundancySpace& s, int64_t b, int64_t h, int64_t n) {
    const int64_t first = (b * a.keys.heads + h) * a.keys.length;
    std::fill_n(a.last + first, a.keys.length, -1);
    std::fill_n(a.cosine + first, a.keys.length, 0.0f);
    for (int64_t c = 0; c < n; ++c) {
        widen_row<Float>(a.keys.row<const T>(b, h, s.position[c]), a.keys.width, s.inverse[c], s.unit + c * padded(a.keys.width));
        prepare_key(s, c, a.keys.width);
    }
    const Neighbours keys{a, s, n};
    keys.find();
    for (int64_t c = 0; c < n; ++c) {
        const int64_t other = std::max(s.found[c], 0);
        a.last[first + s.position[c]] = s.position[other];
        if (other != c) a.cosine[first + s.position[c]] = keys.cosine(c, other);
    }
}

inline void key_redundancy(const KeyRedundancy& a, Scratch& scratch, int64_t begin, int64_t end) {
    const RedundancySpace s(a, scratch.space.data());
    for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / a.keys.heads, h = item % a.keys.heads, n = a.counted.list(b, a.keys.length, s.position);
        visit_narrow(a.keys.dtype, [&](auto t) {
            using T = decltype(t);
            unit_sums<T>(a, s, b, h, n);
            if (a.similarity) cosine_sums<T>(a, s, b, h, n);
            if (a.last) last_neighbours<T>(a, s, b, h, n);
        });
    }
}
