// Products of keys with columns that were packed side by side, summed in float. Included inside each ISA's namespace.

// Vectors of columns, and keys, whose products are in registers together.
template <class V>
constexpr int kColumnVectors = V::width >= 16 ? 4 : 2;
template <class V>
constexpr int kColumns = kColumnVectors<V> * V::width;
constexpr int kRowsAtOnce = 6;

// Rows and columns of floats.
template <class V>
struct Singles {
    using Word = float;
    using Entry = float;
    using Operand = typename V::F;
    static Operand load(const float* words) { return V::load(words); }
    static Operand all(const float* row, int64_t word) { return V::set(row[word]); }
    static typename V::F add(Operand column, Operand factor, typename V::F sum) { return V::fma(column, factor, sum); }
};

#if defined(DISTILKERNELS_NATIVE_BF16)
// Of pairs of bfloat16: exact products, summed in float.
struct Pairs {
    using Word = uint32_t;
    using Entry = bf16;
    using Operand = __m512i;
    static Operand load(const uint32_t* words) { return _mm512_loadu_si512(words); }
    static Operand all(const bf16* row, int64_t word) {
        int32_t pair;
        std::memcpy(&pair, row + 2 * word, 4);
        return _mm512_set1_epi32(pair);
    }
    static __m512 add(Operand column, Operand factor, __m512 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)column, (__m512bh)factor); }
};
#endif

// to[r·stride + c] = scale·Σ_d columns[d·column_stride + c]·rows[r][d] of six rows, d a word
template <class V, class Words, int vectors>
inline void six_products(const typename Words::Word* columns, int64_t column_stride, const typename Words::Entry* const* rows, int64_t depth, float scale,
                         float* to, int64_t stride) {
    using F = typename V::F;
    const typename Words::Entry *x0 = rows[0], *x1 = rows[1], *x2 = rows[2], *x3 = rows[3], *x4 = rows[4], *x5 = rows[5];
    F c[kRowsAtOnce][vectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRowsAtOnce; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) c[r][v] = V::set(0);
    for (int64_t d = 0; d < depth; ++d, columns += column_stride) {
        typename Words::Operand column[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) column[v] = Words::load(columns + v * V::width);
        const auto add = [&](F(&sums)[vectors], typename Words::Operand factor) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sums[v] = Words::add(column[v], factor, sums[v]);
        };
        add(c[0], Words::all(x0, d));
        add(c[1], Words::all(x1, d));
        add(c[2], Words::all(x2, d));
        add(c[3], Words::all(x3, d));
        add(c[4], Words::all(x4, d));
        add(c[5], Words::all(x5, d));
    }
    const F times = V::set(scale);
#pragma GCC unroll 6
    for (int r = 0; r < kRowsAtOnce; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) V::store(to + r * stride + v * V::width, c[r][v] * times);
}

// The same of `count` rows, a multiple of six, and columns in whole vectors. Panels of columns lie one after the other in `packed`,
// each [depth, its columns].
template <class V, class Words>
inline void products(const typename Words::Word* packed, int64_t columns, const typename Words::Entry* const* rows, int64_t count, int64_t depth,
                     float scale, float* to, int64_t stride) {
    for (int64_t c = 0; c < columns; c += kColumns<V>) {
        const int64_t wide = std::min<int64_t>(kColumns<V>, columns - c);
        const auto* panel = packed + c * depth;
        for (int64_t r = 0; r < count; r += kRowsAtOnce) {
            float* at = to + r * stride + c;
            switch (wide / V::width) {
                case 1: six_products<V, Words, 1>(panel, wide, rows + r, depth, scale, at, stride); break;
                case 2: six_products<V, Words, 2>(panel, wide, rows + r, depth, scale, at, stride); break;
                case 3: six_products<V, Words, 3>(panel, wide, rows + r, depth, scale, at, stride); break;
                default: six_products<V, Words, 4>(panel, wide, rows + r, depth, scale, at, stride);
            }
        }
    }
}

// Where entry (d, c) of `columns` packed columns is.
template <class V>
inline int64_t packed_at(int64_t c, int64_t d, int64_t columns, int64_t depth) {
    const int64_t panel = c / kColumns<V> * kColumns<V>, wide = std::min<int64_t>(kColumns<V>, columns - panel);
    return panel * depth + d * wide + (c - panel);
}

// x in float, zeros up to a whole widest vector
template <class V, class T>
inline void widen_row(const T* x, int64_t n, float factor, float* to) {
    const auto times = V::set(factor);
    int64_t d = 0;
    for (; d + V::width <= n; d += V::width) V::store(to + d, V::load(x + d) * times);
    for (; d < n; ++d) to[d] = widen(x[d]) * factor;
    for (; d < padded(n); ++d) to[d] = 0;
}

// f(element type) for what is float at most
template <class Visitor>
inline void visit_narrow(DType dtype, Visitor&& visit) {
    visit_dtype(dtype, [&](auto v, auto t) {
        if constexpr (!std::is_same<decltype(t), double>::value) visit(t);
    });
}
