// d logits from the row coefficients; primitives/vocab_stats.py is the definition. Included inside each ISA's namespace.

// The dense formula with dz/dx folded in; `slope` is what of dz/dx is constant.
template <class V, Map map>
struct Dense {
    using F = typename V::F;
    using S = typename V::S;
    Transform<V, map> f;
    // the reference in two parts, so that d = z − ref keeps the row's double lse
    F high, low, a, b, c, d, t1_high, t1_low;

    Dense(const Head& head, const double* coef, double slope)
        : f(head),
          high(V::set(coef[0])),
          low(V::set(remainder(coef[0]))),
          a(V::set(coef[1] * slope)),
          b(V::set(coef[2] * slope)),
          c(V::set(coef[3] * slope)),
          d(V::set(coef[4] * slope)),
          t1_high(V::set(coef[5])),
          t1_low(V::set(remainder(coef[5]))) {}

    static double remainder(double x) {
        const double high = double(S(x));
        return std::isfinite(high) ? x - high : 0;
    }

    template <bool constant_or_t1>
    F gradient(F x) const {
        const auto p = f.at(x);
        F distance = (p.z - high) - low;
        const F e = exp_clamped(V(), distance);
        F g = e * V::fma(b, distance, a);
        if constexpr (constant_or_t1) {
            F at_t1 = (p.at_t1 - t1_high) - t1_low;
            g = V::fma(d, exp_clamped(V(), at_t1), g) + V::keep(V::finite(p.z), c);
        }
        if constexpr (map == Map::softcap) g = g * p.slope;
        return g;
    }
};

template <class V, bool constant_or_t1, Map map, class T>
void gradient_of_some(const Dense<V, map>& dense, const T* x, T* out, int64_t n) {
    for (int64_t i = 0; i < n; i += V::width) {
        const int64_t take = std::min<int64_t>(V::width, n - i);
        T lanes[V::width] = {};
        std::memcpy(lanes, x + i, take * sizeof(T));
        V::store(lanes, dense.template gradient<constant_or_t1>(V::load(lanes)));
        std::memcpy(out + i, lanes, take * sizeof(T));
    }
}

template <class V, bool constant_or_t1, bool stream, Map map, class T>
void gradient_of_row(const Dense<V, map>& dense, const T* x, T* out, int64_t columns) {
    int64_t c = 0;
    if (stream) {
        const int64_t lead = int64_t((64 - reinterpret_cast<uintptr_t>(out) % 64) % 64 / sizeof(T));
        c = std::min(lead, columns);
        gradient_of_some<V, constant_or_t1>(dense, x, out, c);
    }
    for (; c + block<V> <= columns; c += block<V>) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto g = dense.template gradient<constant_or_t1>(V::load(x + c + i * V::width));
            if (stream) V::stream(out + c + i * V::width, g);
            else V::store(out + c + i * V::width, g);
        }
    }
    gradient_of_some<V, constant_or_t1>(dense, x + c, out + c, columns - c);
}

template <class V, bool constant_or_t1, Map map, class T>
void backward_rows(const VocabStatsBackward& a, Scratch&, int64_t begin, int64_t end) {
    const int64_t columns = a.head.columns, vocab = a.logits.vocab, k = a.ids.data ? a.ids.count : 0;
    const double slope = a.head.scale / a.head.temperature;
    // a fresh gradient is not read back: writing around the cache saves reading its lines first
    const bool stream = a.out.data != a.logits.data;
    for (int64_t r = begin; r < end; ++r) {
        const double* coef = a.coef + 6 * r;
        const T* x = a.logits.row<const T>(r);
        T* out = a.out.row<T>(r);
        if (coef[1] == 0 && coef[2] == 0 && coef[3] == 0 && coef[4] == 0) {
            std::memset(static_cast<void*>(out), 0, vocab * sizeof(T));
        } else {
            const Dense<V, map> dense(a.head, coef, slope);
            if (stream) gradient_of_row<V, constant_or_t1, true>(dense, x, out, columns);
            else gradient_of_row<V, constant_or_t1, false>(dense, x, out, columns);
            std::memset(static_cast<void*>(out + columns), 0, (vocab - columns) * sizeof(T));
        }
        for (int64_t slot = r * k; slot < (r + 1) * k; ++slot) {
            const int64_t id = a.ids.at(slot);
            if (id < 0 || id >= vocab) continue;
            narrow(a.wide_entries ? static_cast<const double*>(a.entries)[slot] : static_cast<const float*>(a.entries)[slot], out[id]);
        }
    }
    if (stream) end_of_streams();
}

inline void vocab_stats_backward(const VocabStatsBackward& a, Scratch& s, int64_t begin, int64_t end) {
    visit_dtype(a.dtype, [&](auto v, auto t) {
        visit_map(a.head, [&](auto m) {
            using V = decltype(v);
            using T = decltype(t);
            (a.constant_or_t1 ? backward_rows<V, true, decltype(m)::map, T> : backward_rows<V, false, decltype(m)::map, T>)(a, s, begin, end);
        });
    });
}
