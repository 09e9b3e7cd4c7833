// The k largest entries, the log-sum-exp and the tail of rows; primitives/topk_select.py is the definition. Included inside each ISA's
// namespace.
//
// One sweep leaves Σ e^{z − ref} of every tile, and the largest entry of each of its lanes. The k-th largest of those bounds the
// k-th entry from below, and the tiles of the k lanes that come first by (largest, lower tile) hold all k entries. Only they are
// read again: what is above the bound is a candidate, the rest is the tile's new sum.

// A raw logit as what is compared: NaN aside, the larger comes first. A sign changes without arithmetic, so that denormals stay apart.
template <class V, Map map>
struct Order {
    typename V::M reversed, any;
    explicit Order(const Head& head) : reversed(V::gt(V::set(head.scale < 0), V::set(0))), any(V::gt(V::set(head.scale != 0), V::set(0))) {}

    typename V::F of(typename V::F x) const {
        if constexpr (map == Map::plain) return x;
        return V::keep(any, V::select(reversed, -x, x));
    }
};

// Columns [c, c + block) in the order and as z, −inf from `end` on.
template <class V, Map map, class T>
inline void load_both(typename V::F (&y)[4], typename V::F (&z)[4], const T* x, int64_t c, int64_t end, const Transform<V, map>& f,
                      const Order<V, map>& order) {
    T rest[block<V>];
    const bool whole = end - c >= block<V>;
    const T* from = x + c;
    if (__builtin_expect(!whole, 0)) {
        std::memset(rest, 0, sizeof rest);
        std::memcpy(rest, from, (end - c) * sizeof(T));
        from = rest;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const auto raw = V::load(from + i * V::width);
        y[i] = order.of(raw);
        z[i] = f.z(raw);
    }
    if (__builtin_expect(!whole, 0)) {
        const uint64_t gone = ~uint64_t(0) << (end - c) & ~uint64_t(0) >> (64 - block<V>);
        hide<V>(y, gone);
        hide<V>(z, gone);
    }
}

// Σ e^{z − ref} of [begin, end), and the largest of every lane.
template <class V, Map map, class T>
inline double sweep_tile(const T* x, int64_t begin, int64_t end, const Transform<V, map>& f, const Order<V, map>& order, double ref,
                         typename V::S* tops) {
    using F = typename V::F;
    const F reference = V::set(ref), zero = V::set(0);
    F sums[4] = {zero, zero, zero, zero}, top = V::set(-kInf);
    for (int64_t c = begin; c < end; c += block<V>) {
        F y[4], z[4];
        load_both<V, map>(y, z, x, c, end, f, order);
        top = V::max(V::max(V::max(y[0], y[1]), V::max(y[2], y[3])), top);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            F d = z[i] - reference;
            sums[i] = sums[i] + exp_clamped(V(), d);
        }
    }
    V::store(tops, top);
    return V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

struct Swept {
    double ref = -kInf;
    bool nan = false, infinite = false;  // infinite: some z is +inf, and the sums are of no use
};

// Fills tile_sums, tile_refs and the lanes' largest. The reference is chosen and raised as in `sweep`.
template <class V, Map map, class T>
Swept sweep_tiles(Scratch& s, const T* x, int64_t columns, int64_t tile, const Transform<V, map>& f, const Order<V, map>& order) {
    auto* tops = s.row<typename V::S>(0);
    Swept row;
    for (int64_t t = 0, begin = 0; begin < columns; ++t, begin += tile, tops += V::width) {
        const int64_t end = std::min(columns, begin + tile);
        for (int64_t c = begin; row.ref == -kInf && c < end; c += block<V>)
            row.ref = largest<V, map>(x, c, std::min<int64_t>(end, c + block<V>), s.hidden.data(), f);
        double sum = sweep_tile<V, map>(x, begin, end, f, order, row.ref == -kInf ? 0 : row.ref, tops);
        if (!(sum >= 0 && sum < kTooLarge)) {
            const double top = largest<V, map>(x, begin, end, s.hidden.data(), f);
            row.nan = std::isnan(top) || std::isnan(row.ref);
            if (row.nan) return row;
            if (top == kInf) {
                row.infinite = true;
                sum = 0;
            } else if (top > row.ref) {
                row.ref = top;
                sum = sweep_tile<V, map>(x, begin, end, f, order, top, tops);
            }
        }
        s.tile_sums[t] = sum;
        s.tile_refs[t] = row.ref;
    }
    return row;
}

// Unsigned numbers in the order of floats, −0 before +0.
inline uint64_t key_of(float y) {
    const uint32_t u = bits_of(y);
    return u >> 31 ? ~u : u | 0x80000000;
}
inline uint64_t key_of(double y) {
    uint64_t u;
    std::memcpy(&u, &y, 8);
    return u >> 63 ? ~u : u | uint64_t(1) << 63;
}
inline void of_key(uint64_t key, float& y) { y = float_of(key >> 31 & 1 ? uint32_t(key) & 0x7fffffff : ~uint32_t(key)); }
inline void of_key(uint64_t key, double& y) {
    const uint64_t u = key >> 63 ? key & ~(uint64_t(1) << 63) : ~key;
    std::memcpy(&y, &u, 8);
}

// What makes k of n numbers the largest: those above the bar, and the first `ties` that equal it.
template <class S>
struct Cut {
    S bar;
    int64_t ties;
};

// Bisection between the bits of the smallest and the largest; up to `more` than k may do. k < n, and −inf follows `y` up to a
// whole block.
template <class V>
Cut<typename V::S> cut(const typename V::S* y, int64_t n, int64_t k, int64_t more) {
    using S = typename V::S;
    const auto above = [&](S bar) {
        const auto bars = V::set(bar);
        int64_t count = 0;
        for (int64_t i = 0; i < n; i += block<V>)
            for (int v = 0; v < 4; ++v) count += __builtin_popcount(V::bits(V::gt(V::load(y + i + v * V::width), bars)));
        return count;
    };
    auto lowest = V::set(-y[0]), highest = V::set(y[0]);
    for (int64_t i = 0; i + V::width <= n; i += V::width) {
        lowest = V::max(-V::load(y + i), lowest);
        highest = V::max(V::load(y + i), highest);
    }
    S least = -V::top(lowest), most = V::top(highest);
    for (int64_t i = n / V::width * V::width; i < n; ++i) {
        least = std::min(least, y[i]);
        most = std::max(most, y[i]);
    }
    uint64_t low = key_of(least) - 1, high = key_of(most);
    while (high - low > 1) {
        const uint64_t middle = low + (high - low) / 2;
        S bar;
        of_key(middle, bar);
        const int64_t count = above(bar);
        if (count >= k && count <= k + more) return {bar, 0};
        (count < k ? high : low) = middle;
    }
    S bar;
    of_key(high, bar);
    return {bar, k - above(bar)};
}

template <class V>
void pad(typename V::S* y, int64_t n, typename V::S value) {
    for (int64_t i = n; i % block<V>; ++i) y[i] = value;
}

// A row's candidates: ids in s.candidates, ascending, and entries in row 1. Entries at or below the bar are none.
template <class V, Map map>
struct Candidates {
    using S = typename V::S;
    using F = typename V::F;
    static constexpr S inf = std::numeric_limits<S>::infinity();

    Scratch& s;
    const Transform<V, map>& f;
    const Order<V, map>& order;
    const F reference;
    const int64_t k, capacity = int64_t(s.candidates.size());
    S* const y = s.row<S>(1);
    int64_t count = 0;
    S bar = -inf;
    double dropped = 0;  // Σ e^{z − ref}

    Candidates(Scratch& s, int64_t k, double ref, const Transform<V, map>& f, const Order<V, map>& order)
        : s(s), f(f), order(order), reference(V::set(ref == -kInf ? 0 : ref)), k(k) {}

    F exp_of(F z) const {
        F d = z - reference;
        return exp_clamped(V(), d);
    }

    // All but the k largest go; of equal ones the last, and any that come later.
    void drop() {
        pad<V>(y, count, -inf);
        auto [least, ties] = cut<V>(y, count, k, 0);
        bar = least;
        pad<V>(y, count, bar);
        const F bars = V::set(bar);
        F sum = V::set(0);
        for (int64_t i = 0; i < count; i += V::width) {
            const F entries = V::load(y + i);
            sum = sum + V::keep(V::gt(bars, entries), exp_of(f.z(order.of(entries))));
        }
        int64_t kept = 0, equal = -ties;
        for (int64_t i = 0; i < count; ++i) {
            const bool stays = y[i] > bar || (y[i] == bar && ties-- > 0);
            equal += y[i] == bar;
            y[kept] = y[i];
            s.candidates[kept] = s.candidates[i];
            kept += stays;
        }
        count = kept;
        dropped += V::sum(sum) + double(equal) * double(V::top(exp_of(f.z(order.of(bars)))));
    }

    // Candidates of [begin, end), and Σ e^{z − ref} over the rest.
    template <class T>
    double take(const T* x, int64_t begin, int64_t end) {
        const F zero = V::set(0);
        F sums[4] = {zero, zero, zero, zero};
        for (int64_t c = begin; c < end; c += block<V>) {
            F entries[4], z[4];
            load_both<V, map>(entries, z, x, c, end, f, order);
            const F bars = V::set(bar);
            uint64_t over = 0;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const auto above = V::gt(entries[i], bars);
                over |= uint64_t(V::bits(above)) << (i * V::width);
                sums[i] = sums[i] + V::select(above, zero, exp_of(z[i]));
            }
            if (over == 0) continue;
            S lanes[block<V>];
            for (int i = 0; i < 4; ++i) V::store(lanes + i * V::width, entries[i]);
            for (; over; over &= over - 1, ++count) {
                const int lane = __builtin_ctzll(over);
                y[count] = lanes[lane];
                s.candidates[count] = c + lane;
            }
            if (count > capacity - block<V>) drop();
        }
        return V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }

    // The first k entries of the row. False if fewer are above −inf.
    template <class T>
    bool pick(const T* x, int64_t columns, int64_t tile, double ref) {
        const int64_t tiles = int64_t(s.tile_sums.size()), lanes = tiles * V::width;
        S* tops = s.row<S>(0);
        Cut<S> first{-inf, 0};
        if (lanes > k) {
            pad<V>(tops, lanes, -inf);
            first = cut<V>(tops, lanes, k, k / 4);
        }
        // a bar of −inf leaves its own entries for the end
        bar = first.ties && first.bar > -inf ? std::nextafter(first.bar, -inf) : first.bar;
        for (int64_t t = 0; t < tiles; ++t, tops += V::width) {
            const F top = V::load(tops), bound = V::set(first.bar);
            bool in = V::bits(V::gt(top, bound));
            if (first.ties > 0) {
                const unsigned all = (1u << V::width) - 1, reached = all & ~V::bits(V::gt(bound, top));
                const int equal = __builtin_popcount(reached) - __builtin_popcount(V::bits(V::gt(top, bound)));
                in |= equal > 0;
                first.ties -= equal;
            }
            if (!in || !V::bits(V::gt(top, V::set(bar)))) continue;
            s.tile_sums[t] = take(x, t * tile, std::min(columns, (t + 1) * tile));
            s.tile_refs[t] = ref;
        }
        if (count > k) drop();
        return count == k;
    }

    // −inf columns, the lowest first. Fewer than k entries are above −inf, so that the first k columns hold enough.
    template <class T>
    void fill(const T* x) {
        for (int64_t c = 0; count < k; ++c) {
            if (V::top(order.of(V::set(S(widen(x[c]))))) > -inf) continue;
            y[count] = -inf;
            s.candidates[count++] = c;
        }
    }
};

// Candidates to s.ids, descending; equal ones keep their order. By digits of a byte, from the lowest.
template <class S>
void rank_candidates(Scratch& s, const S* y) {
    const size_t k = s.ids.size();
    for (size_t i = 0; i < k; ++i) s.ranked[i] = {~key_of(y[i] == 0 ? S(0) : y[i]), s.candidates[i]};
    for (int shift = 0; shift < int(8 * sizeof(S)); shift += 8) {
        size_t begins[256] = {};
        for (const auto& r : s.ranked) ++begins[r.key >> shift & 255];
        if (begins[s.ranked[0].key >> shift & 255] == k) continue;
        size_t begin = 0;
        for (size_t& b : begins) {
            const size_t count = b;
            b = begin;
            begin += count;
        }
        for (const auto& r : s.ranked) s.ranked_aside[begins[r.key >> shift & 255]++] = r;
        s.ranked.swap(s.ranked_aside);
    }
    for (size_t i = 0; i < k; ++i) s.ids[i] = s.ranked[i].id;
}

inline Sums sum_of_tiles(const Scratch& s, double ref, double more) {
    Sums sum;
    sum.ref = ref;
    sum.exp = more;
    double factor = 1, of = ref;
    for (size_t t = 0; t < s.tile_sums.size(); ++t) {
        if (s.tile_sums[t] == 0) continue;
        if (s.tile_refs[t] != of) {
            of = s.tile_refs[t];
            factor = std::exp(of - ref);
        }
        sum.exp += factor * s.tile_sums[t];
    }
    return sum;
}

template <class V, Map map, class T>
void select_rows(const TopkSelect& a, Scratch& s, int64_t begin, int64_t end) {
    using S = typename V::S;
    const Transform<V, map> f(a.head);
    const Order<V, map> order(a.head);
    const int64_t columns = a.head.columns, k = a.k, tile = a.tile();
    for (int64_t r = begin; r < end; ++r) {
        const T* x = a.logits.row<const T>(r);
        S* values = static_cast<S*>(a.values) + r * k;
        int32_t* ids = a.ids + r * k;
        const Swept row = sweep_tiles<V, map>(s, x, columns, tile, f, order);
        if (row.nan) {
            for (int64_t i = 0; i < k; ++i) ids[i] = int32_t(i);
            std::fill_n(values, k, S(kNaN));
            a.lse[r] = a.tail_lse[r] = kNaN;
            continue;
        }
        Candidates<V, map> candidates(s, k, row.ref, f, order);
        const bool enough = candidates.pick(x, columns, tile, row.ref);
        if (!enough) candidates.fill(x);
        rank_candidates(s, candidates.y);
        gather<V, map>(s, x, columns, f, values);
        for (int64_t i = 0; i < k; ++i) ids[i] = int32_t(s.ids[i]);

        Sums tail;
        // of columns of −inf only a softcap makes a tail
        if (k < columns && (enough || map == Map::softcap)) {
            if (enough && !row.infinite) tail = sum_of_tiles(s, row.ref, candidates.dropped);
            // a reference so far above the tail that its exponentials are coarse or gone
            if (!(tail.exp > 0x1p-24)) {
                for (int64_t id : s.ids) s.hidden[id / 64] |= uint64_t(1) << (id & 63);
                tail = sweep<V, false, map>(x, columns, s.hidden.data(), f);
                for (int64_t id : s.ids) s.hidden[id / 64] = 0;
            }
        }
        a.tail_lse[r] = tail.exp > 0 ? tail.ref + std::log(tail.exp) : -kInf;
        a.lse[r] = combine(tail, a.tail_lse[r], s.z).lse;
    }
}

inline void topk_select(const TopkSelect& a, Scratch& s, int64_t begin, int64_t end) {
    visit_dtype(a.dtype, [&](auto v, auto t) {
        visit_map(a.head, [&](auto m) { select_rows<decltype(v), decltype(m)::map, decltype(t)>(a, s, begin, end); });
    });
}
