// What temperature, top-k, top-p and min-p leave of rows; primitives/filter_rows.py is the definition. Included inside each ISA's
// namespace.
//
// Every filter keeps what is at least some bar. One sweep leaves Σ e^{(x − ref)/T}, Σ e^d·d and the largest entry of every lane of
// every tile. From them follows a bound below which no bar can lie: of top_k, the k-th largest of those; of top_p, the entry so small
// that a row of such would not make up 1 − p; of min_p, the bar itself. The entries that reach the bound are copied, few on most
// rows, and everything else happens among them: the bars by bisection between the bits of two entries, and the kept one's sums.

// Columns [c, c + block) as they are, −inf from `end` on.
template <class V, class T>
inline void load_raw(typename V::F (&x)[4], const T* row, int64_t c, int64_t end) {
    if (__builtin_expect(end - c >= block<V>, 1)) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) x[i] = V::load(row + c + i * V::width);
        return;
    }
    T rest[block<V>] = {};
    std::memcpy(rest, row + c, (end - c) * sizeof(T));
    for (int i = 0; i < 4; ++i) x[i] = V::load(rest + i * V::width);
    hide<V>(x, ~uint64_t(0) << (end - c) & ~uint64_t(0) >> (64 - block<V>));
}

// d = (x − ref)/T. Relative to an entry of the row, so that an error is one of d and not of x/T.
template <class V>
struct Heat {
    using F = typename V::F;
    F ref, inverse;
    Heat(double ref, double temperature) : ref(V::set(ref)), inverse(V::set(inverse_of(temperature))) {}
    F of(F x) const { return (x - ref) * inverse; }
    // normal and finite: 0·∞ would be NaN at the reference, or at −inf
    static double inverse_of(double temperature) {
        using Limits = std::numeric_limits<typename V::S>;
        return std::min(std::max(1 / temperature, double(Limits::min())), double(Limits::max()));
    }
};

struct HeatedSums {
    double ref = -kInf, exp = 0, exp_d = 0;  // Σ e^d and Σ e^d·d
    bool fit() const { return exp >= 0 && exp < kTooLarge; }
};

// Of [begin, end); with `tops` also the largest of every lane of every tile.
template <class V, class T>
HeatedSums heated_sums(const T* x, int64_t begin, int64_t end, double ref, double temperature, typename V::S* tops) {
    using F = typename V::F;
    const Heat<V> heat(ref, temperature);
    const F zero = V::set(0);
    F exps[4] = {zero, zero, zero, zero}, exp_ds[4] = {zero, zero, zero, zero}, top = V::set(-kInf);
    for (int64_t c = begin; c < end; c += block<V>) {
        F entries[4];
        load_raw<V>(entries, x, c, end);
        top = V::max(V::max(V::max(entries[0], entries[1]), V::max(entries[2], entries[3])), top);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            F d = heat.of(entries[i]);
            const F e = exp_clamped(V(), d);
            exps[i] = exps[i] + e;
            exp_ds[i] = V::fma(e, d, exp_ds[i]);
        }
        if (tops && ((c + block<V>) % FilterRows::kTile == 0 || c + block<V> >= end)) {
            V::store(tops, top);
            tops += V::width;
            top = V::set(-kInf);
        }
    }
    return {ref, V::sum((exps[0] + exps[1]) + (exps[2] + exps[3])), V::sum((exp_ds[0] + exp_ds[1]) + (exp_ds[2] + exp_ds[3]))};
}

// The row's; its reference is NaN or infinite if there is no law. It is chosen and raised as in `sweep`.
template <class V, class T>
HeatedSums heated_row(Scratch& s, const T* x, int64_t columns, double temperature) {
    const uint64_t* hidden = s.hidden.data();
    const Transform<V, Map::plain> plain({1, 1, 0, columns});
    auto* tops = s.row<typename V::S>(0);
    HeatedSums total;
    for (int64_t begin = 0; begin < columns; begin += kChunk, tops += kChunk / FilterRows::kTile * V::width) {
        const int64_t end = std::min(columns, begin + kChunk);
        for (int64_t c = begin; total.ref == -kInf && c < end; c += block<V>)
            total.ref = largest<V, Map::plain>(x, c, std::min<int64_t>(end, c + block<V>), hidden, plain);
        if (!std::isfinite(total.ref) && total.ref != -kInf) return total;
        HeatedSums chunk = heated_sums<V>(x, begin, end, total.ref == -kInf ? 0 : total.ref, temperature, tops);
        if (!chunk.fit()) {
            const double top = largest<V, Map::plain>(x, begin, end, hidden, plain);
            if (!std::isfinite(top)) return {top};
            if (top > total.ref) {
                const double shift = (total.ref - top) / temperature, factor = std::exp(shift);
                total.exp_d = factor == 0 ? 0 : factor * (total.exp_d + shift * total.exp);
                total.exp *= factor;
                total.ref = top;
                chunk = heated_sums<V>(x, begin, end, top, temperature, tops);
            }
        }
        total.exp += chunk.exp;
        total.exp_d += chunk.exp_d;
    }
    return total;
}

// The first of [begin, columns) that is `top`, which is there. Not by way of a double: a denormal would be flushed.
template <class V, class T>
int64_t first_equal(const T* x, int64_t begin, int64_t columns, typename V::S top) {
    const auto tops = V::set(top);
    for (int64_t c = begin;; c += block<V>) {
        typename V::F entries[4];
        load_raw<V>(entries, x, c, columns);
        for (int i = 0; i < 4; ++i) {
            const unsigned reached = ((1u << V::width) - 1) & ~V::bits(V::gt(tops, entries[i]));
            if (reached) return c + i * V::width + __builtin_ctz(reached);
        }
    }
}

// The entries of [0, columns) that are at least `bound` and finite, in their order. How many.
template <class V, class T>
int64_t reaching(const typename V::S* tops, const T* x, int64_t columns, typename V::S bound, typename V::S* to) {
    constexpr unsigned all = (1u << V::width) - 1;
    const auto bounds = V::set(std::max(bound, std::numeric_limits<typename V::S>::lowest()));
    int64_t count = 0;
    for (int64_t begin = 0; begin < columns; begin += FilterRows::kTile, tops += V::width) {
        if (V::bits(V::gt(bounds, V::load(tops))) == all) continue;
        const int64_t end = std::min(columns, begin + FilterRows::kTile);
        for (int64_t c = begin; c < end; c += block<V>) {
            typename V::F entries[4];
            load_raw<V>(entries, x, c, end);
            for (int i = 0; i < 4; ++i) count += V::pack(to + count, entries[i], all & ~V::bits(V::gt(bounds, entries[i])));
        }
    }
    return count;
}

// e^{(y − ref)/T} of n entries; their sum.
template <class V>
double exponentials(const typename V::S* y, int64_t n, const Heat<V>& heat, typename V::S* to) {
    double sum = 0;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        auto part = V::set(0);
        for (int64_t i = begin; i < std::min(n, begin + kChunk); i += V::width) {
            auto d = heat.of(V::load(y + i));
            const auto e = exp_clamped(V(), d);
            V::store(to + i, e);
            part = part + e;
        }
        sum += V::sum(part);
    }
    return sum;
}

struct Above {
    int64_t count = 0;
    double mass = 0;
};

// What is above a bar. Past the end y is −inf up to a whole block.
template <class V>
Above above(const typename V::S* y, const typename V::S* weights, int64_t n, typename V::S bar) {
    const auto bars = V::set(bar), zero = V::set(0);
    Above found;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        typename V::F part[4] = {zero, zero, zero, zero};
        for (int64_t i = begin; i < std::min(n, begin + kChunk); i += block<V>) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const auto higher = V::gt(V::load(y + i + j * V::width), bars);
                found.count += __builtin_popcount(V::bits(higher));
                if (weights) part[j] = part[j] + V::keep(higher, V::load(weights + i + j * V::width));
            }
        }
        found.mass += V::sum((part[0] + part[1]) + (part[2] + part[3]));
    }
    if (!weights) found.mass = double(found.count);
    return found;
}

// The smallest of n entries above which there is less than `target` of their weights; a weight is 1 where there are none. −inf if
// that is not in all of them. The arrays are used up: what lies outside the interval is dropped when it is most of what is left.
template <class V>
typename V::S upper_bar(typename V::S* y, typename V::S* weights, int64_t n, double total, double target) {
    using S = typename V::S;
    constexpr S inf = std::numeric_limits<S>::infinity();
    if (!(total >= target)) return -inf;
    pad<V>(y, n, -inf);
    if (weights) pad<V>(weights, n, 0);
    auto lowest = V::set(inf), highest = V::set(-kInf);
    for (int64_t i = 0; i < n; i += V::width) {
        const auto entries = V::load(y + i);
        lowest = -V::max(V::select(V::gt(entries, V::set(-kInf)), -entries, V::set(-kInf)), -lowest);
        highest = V::max(entries, highest);
    }
    uint64_t low = key_of(S(-V::top(-lowest))) - 1, high = key_of(S(V::top(highest)));
    double dropped = 0;
    Above over_low{n, total}, over_high;
    S bar;
    while (high - low > 1) {
        const uint64_t middle = low + (high - low) / 2;
        of_key(middle, bar);
        Above over = above<V>(y, weights, n, bar);
        (over.mass + dropped < target ? over_high : over_low) = over;
        (over.mass + dropped < target ? high : low) = middle;
        const int64_t inside = over_low.count - over_high.count;
        if (n < 2 * block<V> || 2 * inside > n) continue;
        S least, most;
        of_key(low, least);
        of_key(high, most);
        const auto leasts = V::set(least), mosts = V::set(most);
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i += V::width) {
            const auto entries = V::load(y + i);
            const unsigned stay = V::bits(V::gt(entries, leasts)) & ~V::bits(V::gt(entries, mosts));
            if (weights) V::pack(weights + kept, V::load(weights + i), stay);
            kept += V::pack(y + kept, entries, stay);
        }
        n = kept;
        pad<V>(y, n, -inf);
        if (weights) pad<V>(weights, n, 0);
        dropped += over_high.mass;
        over_low = {n, 0};
        over_high = {};
    }
    of_key(high, bar);
    return bar;
}

// The smallest number whose probability is at least min_p of the largest's.
template <class S>
S bar_of_min_p(S top, double temperature, double min_p) {
    uint64_t low = key_of(-std::numeric_limits<S>::infinity()), high = key_of(top);
    S bar;
    while (high - low > 1) {
        const uint64_t middle = low + (high - low) / 2;
        of_key(middle, bar);
        (std::exp((double(bar) - double(top)) / temperature) >= min_p ? high : low) = middle;
    }
    of_key(high, bar);
    return bar;
}

template <class V, class T>
void filter_row(const FilterRows& a, Scratch& s, int64_t r) {
    using S = typename V::S;
    constexpr S inf = std::numeric_limits<S>::infinity();
    const T* x = a.logits.row<const T>(a.rows ? a.rows[r] : r);
    const int64_t columns = a.columns, lanes = a.tiles() * V::width;
    const bool cold = a.temperature[r] == 0;
    const double temperature = cold ? 1 : a.temperature[r], p = a.top_p[r], min_p = a.min_p[r];
    S* tops = s.row<S>(0);
    S* bars = static_cast<S*>(a.bar);

    const HeatedSums row = heated_row<V>(s, x, columns, temperature);
    if (!std::isfinite(row.ref)) {
        bars[r] = S(kNaN);
        a.lse[r] = a.lse_all[r] = a.expected[r] = kNaN;
        a.argmax[r] = -1;
        return;
    }
    auto highest = V::set(-kInf);
    for (int64_t i = 0; i < lanes; i += V::width) highest = V::max(V::load(tops + i), highest);
    const S top = S(V::top(highest));
    int64_t tile = 0;
    while (S(V::top(V::load(tops + tile * V::width))) < top) ++tile;
    a.argmax[r] = first_equal<V>(x, tile * a.kTile, columns, top);
    if (cold) {
        bars[r] = top;
        a.lse[r] = a.lse_all[r] = a.expected[r] = 0;
        return;
    }
    const double origin = row.ref / temperature;
    a.lse_all[r] = origin + std::log(row.exp);

    const int64_t k = a.top_k[r];
    const bool by_k = k > 0 && k < columns, by_p = p < 1, by_min = min_p > 0;
    if (!by_k && !by_p && !by_min) {
        bars[r] = -inf;
        a.lse[r] = a.lse_all[r];
        a.expected[r] = origin + row.exp_d / row.exp;
        return;
    }

    S bar = by_min ? bar_of_min_p<S>(top, temperature, min_p) : -inf;
    // what top_p is a share of must be whole: without top_k that is known
    S bound = by_k && by_p ? -inf : bar;
    if (by_p && !(p > 0)) {
        bar = bound = top;
    } else if (by_k && lanes > k) {
        pad<V>(tops, lanes, -inf);
        bound = std::max(bound, cut<V>(tops, lanes, k, k / 4).bar);
    } else if (by_p && !by_k) {
        // entries below this make up less than 1 − p, all together
        const double least = row.ref + temperature * std::log((1 - p) * 0.999 * row.exp / double(columns));
        bound = std::max(bound, std::nextafter(S(least), -inf));
    }
    const Heat<V> heat(row.ref, temperature);
    S *y = s.entries_row<S>(0), *aside = s.entries_row<S>(1), *weights = s.entries_row<S>(2);
    const int64_t n = reaching<V>(tops, x, columns, bound, y);
    double total = row.exp;
    int64_t among = n;
    if (by_k) {
        std::copy_n(y, n, aside);
        const S bar_k = upper_bar<V>(aside, nullptr, n, double(n), double(k));
        bar = std::max(bar, bar_k);
        if (by_p && p > 0) {
            pad<V>(y, n, -inf);
            among = 0;
            for (int64_t i = 0; i < n; i += V::width) {
                const auto entries = V::load(y + i);
                // −inf, past the end, is none
                among += V::pack(aside + among, entries, V::bits(V::gt(entries, V::set(-kInf))) & ~V::bits(V::gt(V::set(bar_k), entries)));
            }
        }
    } else if (by_p && p > 0) {
        std::copy_n(y, n, aside);
    }
    if (by_p && p > 0) {
        pad<V>(aside, among, -inf);
        const double mass = exponentials<V>(aside, among, heat, weights);
        bar = std::max(bar, upper_bar<V>(aside, weights, among, mass, p * (by_k ? mass : total)));
    }

    // of the kept: their sums, and the smallest, which is the bar unless −inf is kept too, as top_k alone may
    if (by_p || by_min) bar = std::max(bar, std::numeric_limits<S>::lowest());
    pad<V>(y, n, -inf);
    auto lowest = V::set(-kInf);
    HeatedSums kept;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        auto exps = V::set(0), exp_ds = V::set(0);
        for (int64_t i = begin; i < std::min(n, begin + kChunk); i += V::width) {
            const auto entries = V::load(y + i);
            const auto out = V::gt(V::set(std::max(bar, std::numeric_limits<S>::lowest())), entries);
            auto d = heat.of(entries);
            const auto e = V::select(out, V::set(0), exp_clamped(V(), d));
            exps = exps + e;
            exp_ds = V::fma(e, d, exp_ds);
            lowest = V::max(V::select(out, V::set(-kInf), -entries), lowest);
        }
        kept.exp += V::sum(exps);
        kept.exp_d += V::sum(exp_ds);
    }
    bars[r] = bar == -inf ? bar : S(-V::top(lowest));
    a.lse[r] = origin + std::log(kept.exp);
    a.expected[r] = origin + kept.exp_d / kept.exp;
}

inline void filter_rows(const FilterRows& a, Scratch& s, int64_t begin, int64_t end) {
    visit_dtype(a.dtype, [&](auto v, auto t) {
        for (int64_t r = begin; r < end; ++r) filter_row<decltype(v), decltype(t)>(a, s, r);
    });
}
