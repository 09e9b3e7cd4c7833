// Which of a panel of unit keys may have a cosine above a threshold with others: a filter that never misses. Included inside each
// ISA's namespace.
//
// Keys are compared in bytes where the machine multiplies bytes, unsigned with signed: k̂ = s·q + ε, |q| ≤ 127, kept as q + 128. What
// that loses is bounded by the norms of the losses:
// |k̂_i·k̂_j − s_i·s_j·q_i·q_j| ≤ |ε_i|·|k̂_j| + |s_i·q_i|·|ε_j| ≤ |ε_i| + (1 + |ε_i|)·|ε_j|.

// Of float arithmetic on unit vectors, with much to spare.
constexpr float kRounding = 1e-5f;

#if defined(DISTILKERNELS_BYTES)

inline void prepare_key(const RedundancySpace& s, int64_t c, int64_t width) {
    const float* unit = s.unit + c * padded(width);
    auto largest = Float::set(0), lost = Float::set(0);
    for (int64_t d = 0; d < padded(width); d += Float::width) largest = Float::max(largest, Float::abs(Float::load(unit + d)));
    const float top = Float::top(largest), scale = top > 0 ? top / 127 : 1;
    for (int64_t d = 0; d < padded(width); d += Float::width) {
        const auto x = Float::load(unit + d);
        const __m512i q = _mm512_cvtps_epi32(x / Float::set(scale));
        const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(q), _mm_set1_epi8(-128));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(s.bytes + c * padded(width) + d), bytes);
        const auto rest = Float::fma(_mm512_cvtepi32_ps(q), Float::set(-scale), x);
        lost = Float::fma(rest, rest, lost);
    }
    s.byte_scale[c] = scale;
    s.byte_error[c] = float(std::sqrt(Float::sum(lost))) * (1 + kRounding) + kRounding;
}

// 64 columns of signed bytes, four at a time, then three numbers of each.
inline void pack_panel(const RedundancySpace& s, const int32_t* ids, int64_t count, int64_t width) {
    const int64_t fours = padded(width) / 4;
    auto* to = reinterpret_cast<int32_t*>(s.panel);
    float* scale = s.panel + kMostColumns * fours;
    float* error = scale + kMostColumns;
    auto* offset = reinterpret_cast<int32_t*>(error + kMostColumns);
    for (int64_t c = 0; c < kMostColumns; ++c) {
        const int64_t id = ids[std::min(c, count - 1)];
        const uint8_t* bytes = s.bytes + id * padded(width);
        int32_t sum = 0;
        for (int64_t d = 0; d < padded(width); ++d) sum += int32_t(bytes[d]) - 128;
        for (int64_t f = 0; f < fours; ++f) {
            int32_t four;
            std::memcpy(&four, bytes + 4 * f, 4);
            to[f * kMostColumns + c] = four ^ int32_t(0x80808080);
        }
        scale[c] = s.byte_scale[id];
        error[c] = s.byte_error[id];
        offset[c] = -128 * sum;
    }
}

// to[r·64 + c] = offset[c] + Σ (q + 128)·q over the bytes of row r and column c, which is their product.
inline void byte_products(const int32_t* column, const int32_t* offset, const uint8_t* const* rows, int64_t fours, int32_t* to) {
    const uint8_t *x0 = rows[0], *x1 = rows[1], *x2 = rows[2], *x3 = rows[3], *x4 = rows[4], *x5 = rows[5];
    __m512i c[kRowsAtOnce][4];
#pragma GCC unroll 6
    for (int r = 0; r < kRowsAtOnce; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) c[r][v] = _mm512_loadu_si512(offset + 16 * v);
    for (int64_t f = 0; f < fours; ++f, column += kMostColumns) {
        __m512i signed_bytes[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) signed_bytes[v] = _mm512_loadu_si512(column + 16 * v);
        const auto add = [&](__m512i(&sums)[4], const uint8_t* x) {
            int32_t four;
            std::memcpy(&four, x + 4 * f, 4);
            const __m512i bytes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sums[v] = _mm512_dpbusd_epi32(sums[v], bytes, signed_bytes[v]);
        };
        add(c[0], x0);
        add(c[1], x1);
        add(c[2], x2);
        add(c[3], x3);
        add(c[4], x4);
        add(c[5], x5);
    }
    // decided on from memory: where they are used from registers, GCC 12 keeps them in memory all along
#pragma GCC unroll 6
    for (int r = 0; r < kRowsAtOnce; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) _mm512_storeu_si512(to + r * kMostColumns + 16 * v, c[r][v]);
}

// Bit c of near[r]: the panel's column c may be above the threshold with ids[r], of six.
inline void near_of_six(const RedundancySpace& s, const int32_t* ids, int64_t width, float threshold, uint64_t* near) {
    const int64_t fours = padded(width) / 4;
    const float *scales = s.panel + kMostColumns * fours, *errors = scales + kMostColumns;
    const uint8_t* rows[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) rows[r] = s.bytes + ids[r] * padded(width);
    auto* products = reinterpret_cast<int32_t*>(s.products);
    byte_products(reinterpret_cast<const int32_t*>(s.panel), reinterpret_cast<const int32_t*>(errors + kMostColumns), rows, fours, products);
    for (int r = 0; r < kRowsAtOnce; ++r) {
        const float scale = s.byte_scale[ids[r]], error = s.byte_error[ids[r]];
        const auto slope = Float::set((1 + error) / scale), least = Float::set((threshold - kRounding - error) / scale);
        near[r] = 0;
        for (int64_t c = 0; c < kMostColumns; c += Float::width) {
            const auto product = _mm512_cvtepi32_ps(_mm512_loadu_si512(products + r * kMostColumns + c));
            const auto bound = Float::fma(product, Float::load(scales + c), slope * Float::load(errors + c));
            near[r] |= uint64_t(Float::bits(Float::gt(bound, least))) << c;
        }
    }
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
    products<Float, Singles<Float>>(s.panel, columns, rows, kRowsAtOnce, width, 1, s.products, columns);
    const auto least = Float::set(threshold - kRounding);
    for (int r = 0; r < kRowsAtOnce; ++r) {
        near[r] = 0;
        for (int64_t c = 0; c < columns; c += Float::width)
            near[r] |= uint64_t(Float::bits(Float::gt(Float::load(s.products + r * columns + c), least))) << c;
    }
}

#endif
