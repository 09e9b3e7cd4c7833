// Products of keys with columns that were packed side by side, in float. Included inside each ISA's namespace.

// Vectors of columns, and keys, whose products are in registers together.
template <class V>
constexpr int kColumnVectors = V::width >= 16 ? 4 : 2;
template <class V>
constexpr int kColumns = kColumnVectors<V> * V::width;
constexpr int kRowsAtOnce = 6;

// to[r·stride + c] = Σ_d columns[d·column_stride + c]·rows[r][d] of six rows
template <class V, int vectors>
inline void six_products(const float* columns, int64_t column_stride, const float* const* rows, int64_t depth, float* to, int64_t stride) {
    using F = typename V::F;
    const float *x0 = rows[0], *x1 = rows[1], *x2 = rows[2], *x3 = rows[3], *x4 = rows[4], *x5 = rows[5];
    F c[kRowsAtOnce][vectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRowsAtOnce; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) c[r][v] = V::set(0);
    for (int64_t d = 0; d < depth; ++d, columns += column_stride) {
        F column[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) column[v] = V::load(columns + v * V::width);
        const auto add = [&](F(&sums)[vectors], float x) {
            const F factor = V::set(x);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sums[v] = V::fma(column[v], factor, sums[v]);
        };
        add(c[0], x0[d]);
        add(c[1], x1[d]);
        add(c[2], x2[d]);
        add(c[3], x3[d]);
        add(c[4], x4[d]);
        add(c[5], x5[d]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRowsAtOnce; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) V::store(to + r * stride + v * V::width, c[r][v]);
}

// The same of `count` rows, a multiple of six, and columns in whole vectors. Panels of columns lie one after the other in `packed`,
// each [depth, its columns].
template <class V>
inline void products(const float* packed, int64_t columns, const float* const* rows, int64_t count, int64_t depth, float* to, int64_t stride) {
    for (int64_t c = 0; c < columns; c += kColumns<V>) {
        const int64_t wide = std::min<int64_t>(kColumns<V>, columns - c);
        const float* panel = packed + c * depth;
        for (int64_t r = 0; r < count; r += kRowsAtOnce) {
            float* at = to + r * stride + c;
            switch (wide / V::width) {
                case 1: six_products<V, 1>(panel, wide, rows + r, depth, at, stride); break;
                case 2: six_products<V, 2>(panel, wide, rows + r, depth, at, stride); break;
                case 3: six_products<V, 3>(panel, wide, rows + r, depth, at, stride); break;
                default: six_products<V, 4>(panel, wide, rows + r, depth, at, stride);
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
