// Draws by an exponential race, and the weights they are by; primitives/sample_rows.py is the definition. Included inside each ISA's
// namespace.
//
// A column wins with −log1p(−u)/w, which is more than u/w. So where u is above the best so far times a bound on w, nothing can win and
// no logarithm is taken: about 72 columns of a row get that far. Those are decided in double.

// Columns [c, c + block) of a row of any dtype, −inf from `end` on.
template <class V>
inline void load_any(typename V::F (&x)[4], DType dtype, const void* row, int64_t c, int64_t end) {
    if constexpr (std::is_same<typename V::S, double>::value) {
        load_raw<V>(x, static_cast<const double*>(row), c, end);
    } else {
        if (dtype == DType::f32) load_raw<V>(x, static_cast<const float*>(row), c, end);
        else if (dtype == DType::bf16) load_raw<V>(x, static_cast<const bf16*>(row), c, end);
        else load_raw<V>(x, static_cast<const f16*>(row), c, end);
    }
}

inline double entry_of(DType dtype, const void* row, int64_t c) {
    switch (dtype) {
        case DType::f32: return static_cast<const float*>(row)[c];
        case DType::bf16: return widen(static_cast<const bf16*>(row)[c]);
        case DType::f16: return widen(static_cast<const f16*>(row)[c]);
        case DType::f64: return static_cast<const double*>(row)[c];
    }
    return kNaN;
}

// A filtered softmax Q over the first `columns` of a row; what lies behind them weighs nothing.
template <class V>
struct Law {
    using F = typename V::F;
    using S = typename V::S;

    DType dtype = DType::f32;
    const void* row = nullptr;  // null for none
    int64_t columns = 0, argmax = -1;
    double temperature = 0, lse = 0;
    S bar = 0;
    bool cold = false;
    F top, inverse, shift, bars;

    Law(const FilteredRows& o, int64_t r, int64_t most) {
        if (!o.rows || o.rows[r] < 0) return;
        dtype = o.dtype;
        const int64_t index = o.rows[r];
        row = static_cast<const char*>(o.logits.data) +
              (index / o.logits.inner * o.logits.outer_stride + index % o.logits.inner * o.logits.inner_stride) * int64_t(itemsize(dtype));
        columns = std::min(most, o.logits.vocab);
        argmax = o.argmax[r];
        temperature = o.temperature[r];
        lse = o.lse[r];
        bar = static_cast<const S*>(o.bar)[r];
        cold = temperature == 0;
        bars = V::set(bar);
        if (cold || argmax < 0) return;
        // relative to the largest entry, so that an error is one of the exponent and not of x/T
        const double highest = at(argmax);
        top = V::set(highest);
        inverse = V::set(Heat<V>::inverse_of(temperature));
        shift = V::set(highest / temperature - lse);
    }

    int64_t passable() const { return std::isnan(bar) ? 0 : columns; }
    bool sound() const { return argmax >= 0 && !std::isnan(lse); }
    double at(int64_t c) const { return entry_of(dtype, row, c); }
    void load(F (&x)[4], int64_t c) const { load_any<V>(x, dtype, row, c, columns); }

    // The definition.
    double weight(int64_t c) const {
        if (c >= columns) return 0;
        if (cold) return c == argmax;
        const double x = at(c);
        return x >= double(bar) ? std::exp(x / temperature - lse) : 0;
    }

    // Q of a block; of an argmax nothing.
    void weights(F (&q)[4], int64_t c) const {
        if (cold || c >= columns) {
            for (auto& weight : q) weight = V::set(0);
            return;
        }
        load(q, c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto out = V::gt(bars, q[i]);
            F d = V::fma(q[i] - top, inverse, shift);
            q[i] = V::select(out, V::set(0), exp_clamped(V(), d));
        }
    }
};

// The rows of one draw, compared column by column.
template <class V>
struct Pair {
    using F = typename V::F;
    // What a float's weight is off by, and more: 3e-7 of the exponent, which is above −88 where it weighs anything.
    static constexpr double kSlack = 4e-5;

    const Law<V> second;
    Mode mode;
    const Law<V> first;
    const double scale;
    const int64_t columns;

    Pair(const DrawWeights& a, int64_t r)
        : second(a.second, r, a.columns),
          mode(second.row ? a.mode : Mode::plain),
          first(a.first, r, mode == Mode::gate ? second.passable() : a.columns),
          scale(mode == Mode::residual ? a.scale[r] : 1),
          columns(first.columns) {}

    bool exists() const { return first.row; }
    bool sound() const { return first.sound() && (mode != Mode::residual || second.sound()); }

    double weight(int64_t c) const {
        const double q = first.weight(c);
        if (mode == Mode::residual) return std::max(scale * q - second.weight(c), 0.0);
        return mode == Mode::gate && !(second.at(c) >= double(second.bar)) ? 0 : q;
    }

    // Weights of a block, where an argmax takes nothing; `bounds` are at least the weights.
    template <bool bounds>
    void weights(F (&w)[4], int64_t c) const {
        first.weights(w, c);
        if (mode == Mode::gate) {
            F y[4];
            second.load(y, c);
            for (int i = 0; i < 4; ++i) w[i] = V::select(V::gt(second.bars, y[i]), V::set(0), V::select(V::nan(y[i]), V::set(0), w[i]));
        } else if (mode == Mode::residual) {
            F p[4];
            second.weights(p, c);
            for (int i = 0; i < 4; ++i) {
                const F q = V::set(scale) * w[i];
                F more = q - p[i];
                if constexpr (bounds) more = V::fma(q + p[i], V::set(kSlack), more);
                w[i] = V::max(more, V::set(0));
            }
        }
    }
};

struct Race {
    int64_t token = -1;
    double best = kInf;

    void enter(int64_t c, double weight, float u) {
        if (!(weight > 0)) return;
        const double time = -std::log1p(-double(u)) / weight;
        if (time < best || (time == best && c < token)) {
            best = time;
            token = c;
        }
    }
};

template <class V>
Race race(const Pair<V>& pair, const Uniforms& uniforms) {
    using F = typename V::F;
    Race found;
    const auto enter = [&](int64_t c) { found.enter(c, pair.weight(c), uniforms.at(c)); };
    // a bound from the start
    if (pair.first.argmax < pair.columns) enter(pair.first.argmax);
    if (pair.first.cold) return found;
    const auto limit = [&] { return V::set(std::min(found.best * (1 + Pair<V>::kSlack), double(std::numeric_limits<typename V::S>::max()))); };
    F limits = limit();
    const F least = V::set(0x1p-34f);  // below every uniform
    for (int64_t c = 0; c < pair.columns; c += block<V>) {
        F w[4];
        pair.template weights<true>(w, c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) w[i] = w[i] * limits;
        if (V::bits(V::gt(V::max(V::max(w[0], w[1]), V::max(w[2], w[3])), least)) == 0) continue;
        F u[4];
        uniforms.block_at<V>(u, c);
        uint64_t open = 0;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) open |= uint64_t(V::bits(V::gt(w[i], u[i]))) << (i * V::width);
        if (__builtin_expect(open == 0, 1)) continue;
        typename V::S lanes[block<V>];
        for (int i = 0; i < 4; ++i) V::store(lanes + i * V::width, u[i]);
        for (; open; open &= open - 1) {
            const int64_t at = __builtin_ctzll(open);
            if (c + at < pair.columns) found.enter(c + at, pair.weight(c + at), float(lanes[at]));
        }
        limits = limit();
    }
    // as late as this, a weight that is too small for a float may have won
    if (found.best > 1e20)
        for (int64_t c = 0; c < pair.columns; ++c) enter(c);
    return found;
}

template <class V>
int64_t count_above(DType dtype, const void* row, int64_t columns, double value) {
    const auto bar = V::set(value);
    int64_t count = 0;
    for (int64_t c = 0; c < columns; c += block<V>) {
        typename V::F x[4];
        load_any<V>(x, dtype, row, c, columns);
        for (int i = 0; i < 4; ++i) count += __builtin_popcount(V::bits(V::gt(x[i], bar)));
    }
    return count;
}

template <class V>
void sample_row(const SampleRows& a, int64_t r) {
    Pair<V> pair(a, r);
    Race found;
    if (pair.exists() && pair.sound()) {
        const Uniforms uniforms(uint64_t(a.seeds[r]), a.positions[r], a.offsets[r], a.streams ? a.streams[r] : a.stream);
        found = race(pair, uniforms);
        if (found.token < 0 && pair.mode == Mode::residual) {
            pair.mode = Mode::plain;
            found = race(pair, uniforms);
        }
    }
    const bool judged_second = a.mode == Mode::gate;
    const Law<V>& judge = judged_second ? pair.second : pair.first;
    const int64_t vocab = std::min(a.vocab, (judged_second ? a.second : a.first).logits.vocab);
    const bool judged = found.token >= 0 && judge.row;
    const double value = judged ? judge.at(found.token) : kNaN;
    a.token[r] = found.token;
    static_cast<typename V::S*>(a.value)[r] = typename V::S(value);
    a.rank[r] = judged ? count_above<V>(judge.dtype, judge.row, vocab, value) : -1;
    a.compared[r] = found.token >= 0 && pair.mode != Mode::plain;
}

template <class V>
double total_weight(const Pair<V>& pair) {
    if (!pair.exists() || pair.columns == 0) return 0;
    if (!pair.sound()) return kNaN;
    if (pair.first.cold) return pair.first.argmax < pair.columns ? pair.weight(pair.first.argmax) : 0;
    double sum = 0;
    for (int64_t begin = 0; begin < pair.columns; begin += kChunk) {
        const auto zero = V::set(0);
        typename V::F sums[4] = {zero, zero, zero, zero};
        for (int64_t c = begin; c < std::min(pair.columns, begin + kChunk); c += block<V>) {
            typename V::F w[4];
            pair.template weights<false>(w, c);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sums[i] = sums[i] + w[i];
        }
        sum += V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    if (pair.mode == Mode::residual && pair.second.cold) {
        const int64_t at = pair.second.argmax;
        sum += pair.weight(at) - pair.scale * pair.first.weight(at);
    }
    return sum;
}

// f(vector tag) with that of a draw's dtypes.
template <class Visitor>
inline void visit_vector(DType dtype, Visitor&& visit) {
    if (dtype == DType::f64) visit(Double());
    else visit(Float());
}

inline void sample_rows(const SampleRows& a, Scratch&, int64_t begin, int64_t end) {
    visit_vector(a.first.dtype, [&](auto v) {
        for (int64_t r = begin; r < end; ++r) sample_row<decltype(v)>(a, r);
    });
}

inline void weigh_rows(const WeighRows& a, Scratch&, int64_t begin, int64_t end) {
    visit_vector(a.first.dtype, [&](auto v) {
        for (int64_t r = begin; r < end; ++r) a.out[r] = total_weight(Pair<decltype(v)>(a, r));
    });
}
