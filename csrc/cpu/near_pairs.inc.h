// Which of a panel of unit keys may have a cosine above a threshold with others: a filter that never misses. Included inside each
// ISA's namespace.
//
// Keys are compared in bytes where the machine multiplies bytes, k̂ = s·q + ε, |q| ≤ 127. What that loses is bounded by the norms of
// the losses: |k̂_i·k̂_j − s_i·s_j·q_i·q_j| ≤ |ε_i|·|k̂_j| + |s_i·q_i|·|ε_j| ≤ |ε_i| + (1 + |ε_i|)·|ε_j|.

// Of float arithmetic on unit vectors, with much to spare.
constexpr float kRounding = 1e-5f;

#if defined(DISTILKERNELS_BYTES)

// Room in `panel` for 64 columns of bytes, then for the three numbers of each.
inline void prepare_key(const RedundancySpace& s, int64_t c, int64_t width) {
    const float* unit = s.unit + c * padded(width);
    float largest = 0;
    for (int64_t d = 0; d < width; ++d) largest = std::max(largest, std::abs(unit[d]));
    const float scale = largest > 0 ? largest / 127 : 1;
    double lost = 0;
    for (int64_t d = 0; d < padded(width); ++d) {
        const float q = std::nearbyint(unit[d] / scale), rest = unit[d] - q * scale;
        s.bytes[c * padded(width) + d] = int8_t(q);
        lost += double(rest) * rest;
    }
    s.byte_scale[c] = scale;
    s.byte_error[c] = float(std::sqrt(lost)) * (1 + kRounding) + kRounding;
}

inline void pack_panel(const RedundancySpace& s, const int32_t* ids, int64_t count, int64_t width) {
    const int64_t fours = padded(width) / 4;
    auto* to = reinterpret_cast<int32_t*>(s.panel);
    float* scale = s.panel + kMostColumns * fours;
    float* error = scale + kMostColumns;
    auto* offset = reinterpret_cast<int32_t*>(error + kMostColumns);
    for (int64_t c = 0; c < kMostColumns; ++c) {
        const int64_t id = ids[std::min(c, count - 1)];
        const int8_t* bytes = s.bytes + id * padded(width);
        int32_t sum = 0;
        for (int64_t d = 0; d < padded(width); ++d) sum += bytes[d];
        for (int64_t f = 0; f < fours; ++f) std::memcpy(to + f * kMostColumns + c, bytes + 4 * f, 4);
        scale[c] = s.byte_scale[id];
        error[c] = s.byte_error[id];
        offset[c] = -128 * sum;
    }
}

// Σ over fours of unsigned (q + 128) and signed bytes, less 128·Σq. Named members stay in registers, an array of them does not.
struct ByteSums {
    __m512i a, b, c, d;

    void add(int32_t four, __m512i p, __m512i q, __m512i r, __m512i t) {
        const __m512i x = _mm512_set1_epi32(four ^ int32_t(0x80808080));
        a = _mm512_dpbusd_epi32(a, x, p);
        b = _mm512_dpbusd_epi32(b, x, q);
        c = _mm512_dpbusd_epi32(c, x, r);
        d = _mm512_dpbusd_epi32(d, x, t);
    }
};

inline uint64_t above(const ByteSums& sums, float scale, float error, const float* scales, const float* errors, float threshold) {
    const __m512 slope = _mm512_set1_ps((1 + error) / scale), least = _mm512_set1_ps((threshold - kRounding - error) / scale);
    const auto one = [&](__m512i sum, int at) -> uint64_t {
        const __m512 bound = _mm512_mul_ps(slope, _mm512_loadu_ps(errors + at));
        return _mm512_cmp_ps_mask(_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scales + at), bound), least, _CMP_GT_OQ);
    };
    return one(sums.a, 0) | one(sums.b, 16) << 16 | one(sums.c, 32) << 32 | one(sums.d, 48) << 48;
}

// Bit c of near[r]: the panel's column c may be above the threshold with ids[r], of six.
inline void near_of_six(const RedundancySpace& s, const int32_t* ids, int64_t width, float threshold, uint64_t* near) {
    const int64_t fours = padded(width) / 4;
    const auto* column = reinterpret_cast<const int32_t*>(s.panel);
    const float *scales = s.panel + kMostColumns * fours, *errors = scales + kMostColumns;
    const auto* offset = reinterpret_cast<const int32_t*>(errors + kMostColumns);
    const ByteSums start{_mm512_loadu_si512(offset), _mm512_loadu_si512(offset + 16), _mm512_loadu_si512(offset + 32), _mm512_loadu_si512(offset + 48)};
    ByteSums r0 = start, r1 = start, r2 = start, r3 = start, r4 = start, r5 = start;
    const int8_t* row[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) row[r] = s.bytes + ids[r] * padded(width);
    const int8_t *x0 = row[0], *x1 = row[1], *x2 = row[2], *x3 = row[3], *x4 = row[4], *x5 = row[5];
    const auto four = [](const int8_t* x, int64_t f) {
        int32_t bits;
        std::memcpy(&bits, x + 4 * f, 4);
        return bits;
    };
    for (int64_t f = 0; f < fours; ++f, column += kMostColumns) {
        const __m512i p = _mm512_loadu_si512(column), q = _mm512_loadu_si512(column + 16), r = _mm512_loadu_si512(column + 32),
                      t = _mm512_loadu_si512(column + 48);
        r0.add(four(x0, f), p, q, r, t);
        r1.add(four(x1, f), p, q, r, t);
        r2.add(four(x2, f), p, q, r, t);
        r3.add(four(x3, f), p, q, r, t);
        r4.add(four(x4, f), p, q, r, t);
        r5.add(four(x5, f), p, q, r, t);
    }
    const auto decide = [&](const ByteSums& sums, int r) { near[r] = above(sums, s.byte_scale[ids[r]], s.byte_error[ids[r]], scales, errors, threshold); };
    decide(r0, 0);
    decide(r1, 1);
    decide(r2, 2);
    decide(r3, 3);
    decide(r4, 4);
    decide(r5, 5);
}

#else

inline void prepare_key(const RedundancySpace&, int64_t, int64_t) {}

inline void pack_panel(const RedundancySpace& s, const int32_t* ids, int64_t count, int64_t width) {
    constexpr int64_t columns = kColumns<Float>;
    for (int64_t c = 0; c < columns; ++c) {
        const float* unit = s.unit + ids[std::min(c, count - 1)] * padded(width);
        for (int64_t d = 0; d < width; ++d) s.panel[d * columns + c] = unit[d];
    }
}

inline void near_of_six(const RedundancySpace& s, const int32_t* ids, int64_t width, float threshold, uint64_t* near) {
    constexpr int64_t columns = kColumns<Float>;
    const float* rows[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) rows[r] = s.unit + ids[r] * padded(width);
    products<Float>(s.panel, columns, rows, kRowsAtOnce, width, s.products, columns);
    const auto least = Float::set(threshold - kRounding);
    for (int r = 0; r < kRowsAtOnce; ++r) {
        near[r] = 0;
        for (int64_t c = 0; c < columns; c += Float::width)
            near[r] |= uint64_t(Float::bits(Float::gt(Float::load(s.products + r * columns + c), least))) << c;
    }
}

#endif
