// Statistics of rows of logits; primitives/vocab_stats.py is the definition. Included inside each ISA's namespace.
//
// The columns at a row's ids are hidden from the sweep and added in double afterwards. So the tail is summed directly,
// and lse = tail ⊕ entries loses nothing however small either is.

// A chunk's float sums go into doubles, and a chunk is what is read again when its sum shows the reference too low.
constexpr int64_t kChunk = 4096;
// e^24: terms that dominate stay where z − ref rounds to less than 1e-6, and rows that rise by less are read once.
constexpr double kTooLarge = 0x1p35;

struct Sums {
    double ref = -kInf, exp = 0, exp_d = 0;  // Σ e^d and Σ e^d·d, d = z − ref
    double sum = 0;                          // of finite z
    int64_t finite = 0;
    double top = -kInf;
    int64_t top_begin = 0;    // the chunk that holds the first top
    double runner_up = -kInf;  // the largest top of the other chunks
    int64_t above = 0;        // entries with z above the bar
    bool nan = false;
};

template <class V>
inline void add_finite(const typename V::F (&z)[4], typename V::F& sums, int64_t& count) {
    for (int i = 0; i < 4; ++i) {
        const auto finite = V::finite(z[i]);
        count -= V::width - __builtin_popcount(V::bits(finite));
        sums = sums + V::keep(finite, z[i]);
    }
}

// The sum and the number of the finite z of [begin, end).
template <class V, Map map, class T>
[[gnu::noinline]] void sum_finite(const T* x, int64_t begin, int64_t end, const uint64_t* hidden, const Transform<V, map>& f, Sums& out) {
    typename V::F sums = V::set(0);
    out.finite = (end - begin + block<V> - 1) / block<V> * block<V>;
    for (int64_t c = begin; c < end; c += block<V>) {
        typename V::F z[4];
        load_block<V, map>(z, x, c, end, hidden, f);
        add_finite<V>(z, sums, out.finite);
    }
    out.sum = V::sum(sums);
}

// Not inlined: among the rest of a row's work the loop would be short of registers.
template <class V, bool signals, Map map, class T>
[[gnu::noinline]] Sums sweep_chunk(const T* x, int64_t begin, int64_t end, const uint64_t* hidden, const Transform<V, map>& f, double ref, double bar) {
    using F = typename V::F;
    const F reference = V::set(ref), zero = V::set(0), one = V::set(1), threshold = V::set(bar);
    F exps[4] = {zero, zero, zero, zero}, exp_ds[4] = {zero, zero, zero, zero};
    F sums = zero, top = V::set(-kInf), above = zero;
    Sums out;
    if constexpr (signals) out.finite = (end - begin + block<V> - 1) / block<V> * block<V>;
    for (int64_t c = begin; c < end; c += block<V>) {
        F z[4];
        const bool whole = load_block<V, map>(z, x, c, end, hidden, f);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            F d = z[i] - reference;
            const F e = exp_clamped(V(), d);
            exps[i] = exps[i] + e;
            if constexpr (signals) exp_ds[i] = V::fma(e, d, exp_ds[i]);
        }
        if constexpr (signals) {
            const F highest = V::max(V::max(z[0], z[1]), V::max(z[2], z[3]));
            top = V::max(highest, top);
            if (V::bits(V::gt(highest, threshold))) {
                for (int i = 0; i < 4; ++i) above = above + V::keep(V::gt(z[i], threshold), one);
            }
            if (__builtin_expect(whole, 1)) sums = sums + ((z[0] + z[1]) + (z[2] + z[3]));
            else add_finite<V>(z, sums, out.finite);
        }
    }
    out.exp = V::sum((exps[0] + exps[1]) + (exps[2] + exps[3]));
    if constexpr (signals) {
        out.exp_d = V::sum((exp_ds[0] + exp_ds[1]) + (exp_ds[2] + exp_ds[3]));
        out.sum = V::sum(sums);
        // an infinity or a NaN is seen in the sum alone: then the chunk is read again
        if (!std::isfinite(out.sum)) sum_finite<V, map>(x, begin, end, hidden, f, out);
        out.above = int64_t(V::sum(above));
        out.top = V::top(top);
    }
    return out;
}

// The largest z of [begin, end): −inf if nothing is larger, NaN if anything is NaN.
template <class V, Map map, class T>
[[gnu::noinline]] double largest(const T* x, int64_t begin, int64_t end, const uint64_t* hidden, const Transform<V, map>& f) {
    typename V::F top = V::set(-kInf);
    for (int64_t c = begin; c < end; c += block<V>) {
        typename V::F z[4];
        load_block<V, map>(z, x, c, end, hidden, f);
        if (V::bits(V::nan(z[0])) | V::bits(V::nan(z[1])) | V::bits(V::nan(z[2])) | V::bits(V::nan(z[3]))) return kNaN;
        top = V::max(V::max(V::max(z[0], z[1]), V::max(z[2], z[3])), top);
    }
    return V::top(top);
}

// One read of the row, whatever its spread: the reference is the maximum of the first block that has a finite entry, and
// a chunk whose sum outgrows it is read again, from the first-level cache, against its own maximum.
template <class V, bool signals, Map map, class T>
Sums sweep(const T* x, int64_t columns, const uint64_t* hidden, const Transform<V, map>& f, double bar = kInf) {
    Sums total;
    for (int64_t begin = 0; begin < columns; begin += kChunk) {
        const int64_t end = std::min(columns, begin + kChunk);
        for (int64_t c = begin; total.ref == -kInf && c < end; c += block<V>) {
            total.ref = largest<V, map>(x, c, std::min<int64_t>(end, c + block<V>), hidden, f);
        }
        if (total.ref == -kInf) continue;
        Sums chunk = sweep_chunk<V, signals, map>(x, begin, end, hidden, f, total.ref, bar);
        if (!(chunk.exp >= 0 && chunk.exp < kTooLarge)) {
            const double top = largest<V, map>(x, begin, end, hidden, f);
            if (std::isnan(top) || std::isnan(total.ref)) {
                total.nan = true;
                return total;
            }
            if (top == kInf) {
                // an infinite logit: the lse is infinite and what is weighted by the softmax undefined
                total.ref = kInf;
                chunk.exp = 1;
                chunk.exp_d = kNaN;
                total.exp = total.exp_d = 0;
            } else if (top > total.ref) {
                const double shift = total.ref - top, factor = std::exp(shift);
                total.exp_d = factor == 0 ? 0 : factor * (total.exp_d + shift * total.exp);
                total.exp *= factor;
                total.ref = top;
                chunk = sweep_chunk<V, signals, map>(x, begin, end, hidden, f, top, bar);
            }
        }
        total.exp += chunk.exp;
        total.exp_d += chunk.exp_d;
        total.sum += chunk.sum;
        total.finite += chunk.finite;
        total.above += chunk.above;
        total.runner_up = std::max(total.runner_up, std::min(total.top, chunk.top));
        if (chunk.top > total.top) {
            total.top = chunk.top;
            total.top_begin = begin;
        }
    }
    return total;
}

template <class V, Map map, class T>
int64_t first_at_least(const T* x, int64_t begin, int64_t columns, const uint64_t* hidden, const Transform<V, map>& f, double top) {
    const auto bar = V::set(top);
    for (int64_t c = begin; c < columns; c += block<V>) {
        typename V::F z[4];
        load_block<V, map>(z, x, c, columns, hidden, f);
        constexpr unsigned all = (1u << V::width) - 1;
        if (V::bits(V::gt(bar, V::max(V::max(z[0], z[1]), V::max(z[2], z[3])))) == all) continue;
        for (int i = 0; i < 4; ++i) {
            const unsigned below = V::bits(V::gt(bar, z[i]));
            if (below != all) return c + i * V::width + __builtin_ctz(~below);
        }
    }
    return -1;
}

// Distinct ids into scratch.ids, their bits into scratch.hidden.
inline void mark(const VocabStats& a, Scratch& s, int64_t r) {
    const int64_t k = int64_t(s.ids.size());
    for (int64_t slot = 0; slot < k; ++slot) {
        const int64_t id = a.ids.at(r * k + slot);
        const bool inside = id >= 0 && id < a.logits.vocab;
        const uint64_t bit = uint64_t(1) << (id & 63);
        const bool fresh = inside && !(s.hidden[id / 64] & bit);
        if (fresh) s.hidden[id / 64] |= bit;
        s.ids[slot] = fresh ? id : -1;
    }
}

// z at the distinct ids into scratch.z, and to `values` unless that is null: a double made a float again would lose its denormals.
// After the sweep: the row is then in the second-level cache.
template <class V, Map map, class T>
void gather(Scratch& s, const T* x, int64_t columns, const Transform<V, map>& f, typename V::S* values) {
    const int64_t k = int64_t(s.ids.size());
    for (int64_t slot = 0; slot < k; slot += V::width) {
        const int64_t n = std::min<int64_t>(V::width, k - slot);
        T raw[V::width] = {};
        typename V::S z[V::width];
        for (int64_t i = 0; i < n; ++i)
            if (s.ids[slot + i] >= 0) raw[i] = x[s.ids[slot + i]];
        V::store(z, f.z(V::load(raw)));
        for (int64_t i = 0; i < n; ++i) {
            const int64_t id = s.ids[slot + i];
            s.z[slot + i] = id >= 0 && id < columns ? double(z[i]) : -kInf;
            if (values) values[slot + i] = z[i];
        }
    }
}

// #{v : z_v > bar} and Σ e^{z_v − lse} over them, for every slot that is not empty. The row is in the second-level cache.
template <class V, Map map, class T>
void rank_row(const VocabStats& a, Scratch& s, int64_t r, const T* x, const Transform<V, map>& f, double lse) {
    using S = typename V::S;
    const int64_t k = int64_t(s.ids.size());
    const S* given = static_cast<const S*>(a.thresholds);
    s.bars.clear();
    for (int64_t slot = 0; slot < k; ++slot)
        if (s.ids[slot] >= 0) s.bars.push_back({given ? double(given[r * k + slot]) : s.z[slot], slot});
    const auto below = [](const Scratch::Bar& bar, double value) { return bar.value < value; };
    std::sort(s.bars.begin(), s.bars.end(), [](const auto& p, const auto& q) { return p.value < q.value; });
    const int64_t n = int64_t(s.bars.size());
    for (auto* v : {&s.counts, &s.count_histogram}) std::fill_n(v->begin(), n, 0);
    for (auto* v : {&s.masses, &s.mass_histogram}) std::fill_n(v->begin(), n, 0.0);

    const S high = S(lse);
    const auto lowest = V::set(n ? s.bars[0].value : kInf), reference = V::set(high), rest = V::set(std::isfinite(high) ? lse - double(high) : 0);
    for (int64_t c = 0; n && c < a.head.columns; c += block<V>) {
        typename V::F z[4], e[4];
        load_block<V, map>(z, x, c, a.head.columns, s.hidden.data(), f);
        const auto top = V::max(V::max(z[0], z[1]), V::max(z[2], z[3]));
        if (V::bits(V::gt(top, lowest)) == 0) continue;
        int64_t above_lowest = 0;
        for (int i = 0; i < 4; ++i) {
            auto d = (z[i] - reference) - rest;
            e[i] = exp_clamped(V(), d);
            above_lowest += __builtin_popcount(V::bits(V::gt(z[i], lowest)));
        }
        const int64_t cleared = std::lower_bound(s.bars.begin(), s.bars.end(), double(V::top(top)), below) - s.bars.begin();
        // a vector comparison for each bar, or a binary search for each entry: whichever are fewer
        if (cleared <= above_lowest) {
            for (int64_t j = 0; j < cleared; ++j) {
                const auto bar = V::set(s.bars[j].value);
                auto mass = V::set(0);
                for (int i = 0; i < 4; ++i) {
                    const auto higher = V::gt(z[i], bar);
                    s.counts[j] += __builtin_popcount(V::bits(higher));
                    mass = mass + V::keep(higher, e[i]);
                }
                s.masses[j] += V::sum(mass);
            }
        } else {
            S zs[block<V>], es[block<V>];
            for (int i = 0; i < 4; ++i) {
                V::store(zs + i * V::width, z[i]);
                V::store(es + i * V::width, e[i]);
            }
            for (int i = 0; i < block<V>; ++i) {
                if (!(double(zs[i]) > s.bars[0].value)) continue;
                const int64_t j = std::lower_bound(s.bars.begin(), s.bars.end(), double(zs[i]), below) - s.bars.begin() - 1;
                s.count_histogram[j] += 1;
                s.mass_histogram[j] += es[i];
            }
        }
    }
    int64_t count = 0;
    double mass = 0;
    for (int64_t j = n - 1; j >= 0; --j) {
        count += s.count_histogram[j];
        mass += s.mass_histogram[j];
        const int64_t at = r * k + s.bars[j].slot;
        if (a.rank) a.rank[at] = s.counts[j] + count;
        if (a.mass_above) static_cast<S*>(a.mass_above)[at] = S(s.masses[j] + mass);
    }
}

// Σ e^z and Σ e^z·z with the entries at the ids, relative to the larger of the two parts.
struct Combined {
    double lse, expected;
};

inline Combined combine(const Sums& tail, double tail_lse, const std::vector<double>& entries) {
    double top = tail_lse;
    for (double z : entries) top = std::max(top, z);
    if (std::isinf(top)) return {top, kNaN};
    double exp = 0, exp_d = 0;
    if (tail.exp > 0) {
        const double shift = tail.ref - top, factor = std::exp(shift);
        exp = factor * tail.exp;
        exp_d = factor * (tail.exp_d + shift * tail.exp);
    }
    for (double z : entries) {
        if (z == -kInf) continue;
        const double e = std::exp(z - top);
        exp += e;
        exp_d += e * (z - top);
    }
    return {top + std::log(exp), top + exp_d / exp};
}

inline void nan_row(const VocabStats& a, int64_t r) {
    for (double* out : {a.lse, a.tail_lse, a.expected_logit, a.logit_sum, a.lse_t1, a.max, a.second})
        if (out) out[r] = kNaN;
    if (a.argmax) a.argmax[r] = -1;
}

template <class V, bool signals, Map map, class T>
void stats_rows(const VocabStats& a, Scratch& s, int64_t begin, int64_t end) {
    using S = typename V::S;
    const Transform<V, map> f(a.head);
    Head unheated = a.head;
    unheated.temperature = 1;
    const Transform<V, map> f_t1(unheated);
    const int64_t columns = a.head.columns, k = int64_t(s.ids.size());
    S* gathered = static_cast<S*>(a.gathered);
    S* mass_above = static_cast<S*>(a.mass_above);
    // the rank of one entry is counted on the way; several, and masses, take another pass over the cached row
    const bool counted = signals && a.rank && k == 1 && !a.mass_above && !a.thresholds;

    for (int64_t r = begin; r < end; ++r) {
        const T* x = a.logits.row<const T>(r);
        mark(a, s, r);
        if (counted) gather<V, map>(s, x, columns, f, nullptr);
        Sums tail = sweep<V, signals, map>(x, columns, s.hidden.data(), f, counted ? s.z[0] : kInf);
        if (!counted) gather<V, map>(s, x, columns, f, nullptr);
        for (double z : s.z) tail.nan |= std::isnan(z);

        double top = tail.top, second = tail.runner_up;
        int64_t top_id = -1, finite = tail.finite;
        double sum = tail.sum;
        if (signals && !tail.nan) {
            if (top > -kInf && (a.argmax || a.second)) top_id = first_at_least<V, map>(x, tail.top_begin, columns, s.hidden.data(), f, top);
            if (top_id >= 0 && a.second) {
                // what is second in the chunk of the top: its largest without it
                const uint64_t bit = uint64_t(1) << (top_id & 63);
                s.hidden[top_id / 64] |= bit;
                const int64_t chunk_end = std::min(columns, tail.top_begin + kChunk);
                second = std::max(second, largest<V, map>(x, tail.top_begin, chunk_end, s.hidden.data(), f));
                s.hidden[top_id / 64] &= ~bit;
            }
            for (int64_t slot = 0; slot < k; ++slot) {
                const double z = s.z[slot];
                second = std::max(second, std::min(top, z));
                if (std::isfinite(z)) {
                    sum += z;
                    ++finite;
                }
                if (z > top || (z == top && z > -kInf && s.ids[slot] < top_id)) {
                    top = z;
                    top_id = s.ids[slot];
                }
            }
            if (top == -kInf) top_id = 0;
        }
        for (int64_t id : s.ids)
            if (id >= 0) s.hidden[id / 64] = 0;

        if (gathered)
            for (int64_t slot = 0; slot < k; ++slot) gathered[r * k + slot] = S(tail.nan && s.ids[slot] >= 0 ? kNaN : s.z[slot]);
        for (int64_t slot = 0; slot < k; ++slot) {
            if (a.rank) a.rank[r * k + slot] = -1;
            if (mass_above) mass_above[r * k + slot] = S(kNaN);
        }
        if (a.finite_count) a.finite_count[r] = finite;
        if (tail.nan) {
            nan_row(a, r);
            continue;
        }

        const double tail_lse = tail.exp > 0 ? tail.ref + std::log(tail.exp) : -kInf;
        const Combined all = combine(tail, tail_lse, s.z);
        if (a.lse) a.lse[r] = all.lse;
        if (a.tail_lse) a.tail_lse[r] = tail_lse;
        if (a.expected_logit) a.expected_logit[r] = all.expected;
        if (a.logit_sum) a.logit_sum[r] = sum;
        if (a.max) a.max[r] = top;
        if (a.second) a.second[r] = second;
        if (a.argmax) a.argmax[r] = top_id;
        if (a.lse_t1) {
            const Sums t1 = a.head.temperature == 1 ? Sums() : sweep<V, false, map>(x, columns, s.hidden.data(), f_t1);
            a.lse_t1[r] = a.head.temperature == 1 ? all.lse : t1.exp > 0 ? t1.ref + std::log(t1.exp) : -kInf;
        }
        if (counted) a.rank[r] = s.ids[0] >= 0 ? tail.above : -1;
        else if (a.rank || a.mass_above) rank_row<V, map>(a, s, r, x, f, all.lse);
    }
}

inline void vocab_stats(const VocabStats& a, Scratch& s, int64_t begin, int64_t end) {
    const bool signals = a.expected_logit || a.logit_sum || a.finite_count || a.max || a.argmax || a.second || a.rank;
    visit_dtype(a.dtype, [&](auto v, auto t) {
        visit_map(a.head, [&](auto m) {
            using V = decltype(v);
            using T = decltype(t);
            (signals ? stats_rows<V, true, decltype(m)::map, T> : stats_rows<V, false, decltype(m)::map, T>)(a, s, begin, end);
        });
    });
}
