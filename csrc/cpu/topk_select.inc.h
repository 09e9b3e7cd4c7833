// The k largest entries, the log-sum-exp and the tail of rows; primitives/topk_select.py is the definition. Included inside each ISA's
// namespace.
//
// One sweep leaves a maximum and a Σ e^{z − ref} for every tile. The k tiles that come first by (maximum, lower index) hold all k
// entries, and the k-th of those maxima bounds the k-th entry: only they are looked at again. Then the tiles that hold a selected
// entry are summed again without it.

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

// Raw columns [c, c + block), and a bit for each that is not before `end`.
template <class V, class T>
inline uint64_t load_raw(typename V::F (&x)[4], const T* row, int64_t c, int64_t end) {
    if (end - c >= block<V>) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) x[i] = V::load(row + c + i * V::width);
        return 0;
    }
    T rest[block<V>] = {};
    std::memcpy(rest, row + c, (end - c) * sizeof(T));
    for (int i = 0; i < 4; ++i) x[i] = V::load(rest + i * V::width);
    return ~uint64_t(0) << (end - c) & ~uint64_t(0) >> (64 - block<V>);
}

// Σ e^{z − ref} of [begin, end), and its largest in the order.
template <class V, Map map, class T>
inline double sweep_tile(const T* x, int64_t begin, int64_t end, const Transform<V, map>& f, const Order<V, map>& order, double ref, typename V::S& top) {
    using F = typename V::F;
    const F reference = V::set(ref), zero = V::set(0);
    F sums[4] = {zero, zero, zero, zero}, tops = V::set(-kInf);
    for (int64_t c = begin; c < end; c += block<V>) {
        F z[4], y[4];
        const uint64_t gone = load_raw<V>(z, x, c, end);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            y[i] = order.of(z[i]);
            z[i] = f.z(z[i]);
        }
        if (__builtin_expect(gone != 0, 0)) {
            hide<V>(y, gone);
            hide<V>(z, gone);
        }
        tops = V::max(V::max(V::max(y[0], y[1]), V::max(y[2], y[3])), tops);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            F d = z[i] - reference;
            sums[i] = sums[i] + exp_clamped(V(), d);
        }
    }
    top = V::top(tops);
    return V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

enum class Row { usual, infinite, nan };  // infinite: some z is +inf, and the sums are of no use

// Fills tile_sums, tile_refs and the tiles' maxima. The reference is chosen and raised as in `sweep`.
template <class V, Map map, class T>
Row sweep_tiles(Scratch& s, const T* x, int64_t columns, int64_t tile, const Transform<V, map>& f, const Order<V, map>& order) {
    auto* tops = s.row<typename V::S>(0);
    double ref = -kInf;
    Row row = Row::usual;
    for (int64_t t = 0, begin = 0; begin < columns; ++t, begin += tile) {
        const int64_t end = std::min(columns, begin + tile);
        for (int64_t c = begin; ref == -kInf && c < end; c += block<V>)
            ref = largest<V, map>(x, c, std::min<int64_t>(end, c + block<V>), s.hidden.data(), f);
        double sum = sweep_tile<V, map>(x, begin, end, f, order, ref == -kInf ? 0 : ref, tops[t]);
        if (!(sum >= 0 && sum < kTooLarge)) {
            const double top = largest<V, map>(x, begin, end, s.hidden.data(), f);
            if (std::isnan(top) || std::isnan(ref)) return Row::nan;
            if (top == kInf) {
                row = Row::infinite;
                sum = 0;
            } else if (top > ref) {
                ref = top;
                sum = sweep_tile<V, map>(x, begin, end, f, order, ref, tops[t]);
            }
        }
        s.tile_sums[t] = sum;
        s.tile_refs[t] = ref;
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

// Bisection between the bits of the smallest and the largest. k < n, and −inf follows `y` up to a whole block.
template <class V>
Cut<typename V::S> cut(const typename V::S* y, int64_t n, int64_t k) {
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
        if (count == k) return {bar, 0};
        (count < k ? high : low) = middle;
    }
    S bar;
    of_key(high, bar);
    return {bar, k - above(bar)};
}

template <class V>
void pad(typename V::S* y, int64_t n) {
    for (int64_t i = n; i % block<V>; ++i) y[i] = -std::numeric_limits<typename V::S>::infinity();
}

// Drops all but the k largest candidates, of equal ones the last; entries that come later must be above the bar it returns.
template <class V>
typename V::S drop(Scratch& s, int64_t& n, int64_t k) {
    auto* y = s.row<typename V::S>(1);
    pad<V>(y, n);
    auto [bar, ties] = cut<V>(y, n, k);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
        const bool stays = y[i] > bar || (y[i] == bar && ties-- > 0);
        y[kept] = y[i];
        s.candidates[kept] = s.candidates[i];
        kept += stays;
    }
    n = kept;
    return bar;
}

// The k first entries into candidates and row 1, ids ascending, −inf columns after them; whether there were such.
template <class V, Map map, class T>
bool pick(Scratch& s, const T* x, int64_t columns, int64_t tile, int64_t k, const Order<V, map>& order) {
    using S = typename V::S;
    constexpr S inf = std::numeric_limits<S>::infinity();
    S *tops = s.row<S>(0), *y = s.row<S>(1);
    const int64_t tiles = (columns + tile - 1) / tile;
    // a bar of −inf: its own entries are added at the end
    Cut<S> first{-inf, 0};
    if (tiles > k) {
        pad<V>(tops, tiles);
        first = cut<V>(tops, tiles, k);
    }
    S bar = first.ties && first.bar > -inf ? std::nextafter(first.bar, -inf) : first.bar;
    int64_t n = 0;
    for (int64_t t = 0; t < tiles; ++t) {
        if (!(tops[t] > first.bar || (tops[t] == first.bar && first.ties-- > 0)) || !(tops[t] > bar)) continue;
        const int64_t end = std::min(columns, (t + 1) * tile);
        for (int64_t c = t * tile; c < end; c += block<V>) {
            typename V::F entries[4];
            const uint64_t gone = load_raw<V>(entries, x, c, end);
            const auto bars = V::set(bar);
            uint64_t over = 0;
            for (int i = 0; i < 4; ++i) {
                entries[i] = order.of(entries[i]);
                over |= uint64_t(V::bits(V::gt(entries[i], bars))) << (i * V::width);
            }
            over &= ~gone;
            if (over == 0) continue;
            S lanes[block<V>];
            for (int i = 0; i < 4; ++i) V::store(lanes + i * V::width, entries[i]);
            for (; over; over &= over - 1, ++n) {
                const int lane = __builtin_ctzll(over);
                y[n] = lanes[lane];
                s.candidates[n] = c + lane;
            }
            if (n > int64_t(s.candidates.size()) - block<V>) bar = drop<V>(s, n, k);
        }
    }
    if (n > k) drop<V>(s, n, k);
    const bool filled = n < k;
    // fewer than k entries are above −inf, so that the first k columns hold enough that are not
    for (int64_t c = 0; n < k; ++c) {
        if (V::top(order.of(V::set(typename V::S(widen(x[c]))))) > -inf) continue;
        y[n] = -inf;
        s.candidates[n++] = c;
    }
    return filled;
}

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

// Σ e^z over what is not hidden: the tiles that hold a candidate are summed again. Where a reference is so far above the tail
// that its exponentials are coarse or gone, the whole row is.
template <class V, Map map, class T>
Sums tail_of(Scratch& s, const T* x, int64_t columns, int64_t tile, Row row, const Transform<V, map>& f) {
    const int64_t tiles = (columns + tile - 1) / tile;
    Sums tail;
    if (row == Row::usual) {
        int64_t last = -1;
        for (size_t i = 0; i < s.ids.size(); ++i) {
            const int64_t t = s.candidates[i] / tile, begin = t * tile, end = std::min(columns, begin + tile);
            if (t == last || s.tile_sums[t] == 0) continue;
            s.tile_sums[t] = sweep_chunk<V, false, map>(x, begin, end, s.hidden.data(), f, s.tile_refs[t]).exp;
            last = t;
        }
        tail.ref = s.tile_refs[tiles - 1];
        double factor = 1, ref = tail.ref;
        for (int64_t t = 0; t < tiles; ++t) {
            if (s.tile_sums[t] == 0) continue;
            if (s.tile_refs[t] != ref) {
                ref = s.tile_refs[t];
                factor = std::exp(ref - tail.ref);
            }
            tail.exp += factor * s.tile_sums[t];
        }
        if (tail.exp > 0x1p-24) return tail;
    }
    return sweep<V, false, map>(x, columns, s.hidden.data(), f);
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
        const Row row = sweep_tiles<V, map>(s, x, columns, tile, f, order);
        if (row == Row::nan) {
            for (int64_t i = 0; i < k; ++i) ids[i] = int32_t(i);
            std::fill_n(values, k, S(kNaN));
            a.lse[r] = a.tail_lse[r] = kNaN;
            continue;
        }
        const bool filled = pick<V, map>(s, x, columns, tile, k, order);
        rank_candidates(s, s.row<S>(1));
        gather<V, map>(s, x, columns, f, values);
        for (int64_t i = 0; i < k; ++i) ids[i] = int32_t(s.ids[i]);

        Sums tail;
        // of columns of −inf only a softcap makes a tail
        if (k < columns && (!filled || map == Map::softcap)) {
            for (int64_t id : s.ids) s.hidden[id / 64] |= uint64_t(1) << (id & 63);
            tail = tail_of<V, map>(s, x, columns, tile, row, f);
            for (int64_t id : s.ids) s.hidden[id / 64] = 0;
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
