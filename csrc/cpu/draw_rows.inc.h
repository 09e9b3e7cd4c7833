// Draws from the softmax of tau·z; primitives/draw_rows.py is the definition. Included inside each ISA's namespace.
//
// One sweep leaves Σ e^{tau(z − ref)} of every tile. A draw is found in their running sums, in double, and then in its tile, whose
// exponentials are computed again: a vector at a time, then entry by entry.

struct Weights {
    double ref = -kInf, plain = 0, heated = 0;  // Σ e^d and Σ e^{tau·d}, d = z − ref

    bool fit() const { return plain >= 0 && plain < kTooLarge && heated >= 0 && heated < kTooLarge; }
};

template <class V, bool heated, Map map, class T>
inline Weights weigh_tile(const T* x, int64_t begin, int64_t end, const uint64_t* hidden, const Transform<V, map>& f, double ref, double tau) {
    using F = typename V::F;
    const F reference = V::set(ref), zero = V::set(0), power = V::set(tau);
    F plain[4] = {zero, zero, zero, zero}, hot[4] = {zero, zero, zero, zero};
    for (int64_t c = begin; c < end; c += block<V>) {
        F z[4];
        load_block<V, map>(z, x, c, end, hidden, f);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            F d = z[i] - reference, scaled = d * power;
            plain[i] = plain[i] + exp_clamped(V(), d);
            if constexpr (heated) hot[i] = hot[i] + exp_clamped(V(), scaled);
        }
    }
    const double sum = V::sum((plain[0] + plain[1]) + (plain[2] + plain[3]));
    return {ref, sum, heated ? V::sum((hot[0] + hot[1]) + (hot[2] + hot[3])) : sum};
}

// The row's sums; the tiles' heated ones and their references are left in tile_sums and tile_refs. An infinite or NaN row has
// that as its reference.
template <class V, bool heated, Map map, class T>
Weights weigh_row(const DrawRows& a, Scratch& s, const T* x, const Transform<V, map>& f) {
    const uint64_t* hidden = s.hidden.data();
    Weights total;
    for (int64_t t = 0, begin = 0; begin < a.head.columns; ++t, begin += a.kTile) {
        const int64_t end = std::min(a.head.columns, begin + a.kTile);
        for (int64_t c = begin; total.ref == -kInf && c < end; c += block<V>)
            total.ref = largest<V, map>(x, c, std::min<int64_t>(end, c + block<V>), hidden, f);
        Weights tile;
        if (total.ref > -kInf || std::isnan(total.ref)) tile = weigh_tile<V, heated, map>(x, begin, end, hidden, f, total.ref, a.tau);
        if (!tile.fit()) {
            const double top = largest<V, map>(x, begin, end, hidden, f);
            if (std::isnan(top) || std::isnan(total.ref)) return {kNaN};
            if (top == kInf) {
                total.ref = kInf;
                tile = {};
            } else if (top > total.ref) {
                total.plain *= std::exp(total.ref - top);
                total.heated *= std::exp(a.tau * (total.ref - top));
                total.ref = top;
                tile = weigh_tile<V, heated, map>(x, begin, end, hidden, f, top, a.tau);
            }
        }
        total.plain += tile.plain;
        total.heated += tile.heated;
        s.tile_sums[t] = tile.heated;
        s.tile_refs[t] = total.ref;
    }
    return total;
}

// The lowest lane at which the running sum of the weights is above `target`, else the last that has any weight.
template <class S>
int lane_of(const S* weights, int lanes, double target) {
    int chosen = -1;
    double sum = 0;
    for (int lane = 0; lane < lanes; ++lane) {
        if (!(weights[lane] > 0)) continue;
        chosen = lane;
        sum += weights[lane];
        if (sum > target) break;
    }
    return chosen;
}

// Ids of the draws [first, last) of s.bars, ascending targets that lie in [begin, end), where `before` is the sum of what
// comes earlier and `factor` makes this tile's weights the row's.
template <class V, Map map, class T>
void draw_in_tile(const DrawRows& a, Scratch& s, int64_t first, int64_t last, const T* x, int64_t begin, int64_t end, const Transform<V, map>& f,
                  double ref, double before, double factor) {
    const auto reference = V::set(ref), power = V::set(a.tau);
    typename V::S lanes[V::width] = {};
    int64_t lanes_begin = begin;
    double sum = 0;
    for (int64_t c = begin; c < end && first < last; c += block<V>) {
        typename V::F z[4];
        load_block<V, map>(z, x, c, end, s.hidden.data(), f);
        for (int i = 0; i < 4; ++i) {
            auto d = z[i] - reference;
            if (a.tau != 1) d = d * power;
            const auto weights = exp_clamped(V(), d);
            const double more = V::sum(weights);
            if (!(more > 0)) continue;
            V::store(lanes, weights);
            lanes_begin = c + i * V::width;
            for (double target; first < last && (target = (s.bars[first].value - before) / factor) < sum + more; ++first)
                s.ids[s.bars[first].slot] = lanes_begin + lane_of(lanes, V::width, target - sum);
            sum += more;
        }
    }
    // the sums of the sweep were rounded otherwise: the last entry with any weight is meant
    for (; first < last; ++first) s.ids[s.bars[first].slot] = lanes_begin + lane_of(lanes, V::width, kInf);
}

template <class V, Map map, class T>
void draw_from_tiles(const DrawRows& a, Scratch& s, int64_t r, const T* x, const Transform<V, map>& f, double ref) {
    const int64_t tiles = a.tiles();
    double sum = 0;
    for (int64_t t = 0; t < tiles; ++t) {
        if (s.tile_sums[t] > 0) sum += (s.tile_refs[t] == ref ? 1 : std::exp(a.tau * (s.tile_refs[t] - ref))) * s.tile_sums[t];
        s.tile_sums[t] = sum;
    }
    const uint64_t position = uint64_t(a.positions[r]);
    for (int64_t i = 0; i < a.draws; i += 2) {
        const PhiloxWords words =
            philox(uint64_t(a.seeds[r]), {unsigned(i / 2), unsigned(position), unsigned(position >> 32), unsigned(Stream::capture)});
        s.bars[i] = {uniform53(words.x, words.y) * sum, i};
        if (i + 1 < a.draws) s.bars[i + 1] = {uniform53(words.z, words.w) * sum, i + 1};
    }
    // ascending, so that a tile is visited once
    std::sort(s.bars.begin(), s.bars.end(), [](const auto& p, const auto& q) { return p.value < q.value; });
    const auto sums = s.tile_sums.begin(), sums_end = s.tile_sums.end();
    for (int64_t i = 0, t = 0; i < a.draws;) {
        t = std::upper_bound(sums + t, sums_end, s.bars[i].value) - sums;
        // u·Σ rounded up to Σ: the tile in which the sum gets there
        if (t == tiles) t = std::lower_bound(sums, sums_end, sum) - sums;
        int64_t last = i + 1;
        while (last < a.draws && (s.bars[last].value < sums[t] || sums[t] == sum)) ++last;
        const int64_t begin = t * a.kTile;
        draw_in_tile<V, map>(a, s, i, last, x, begin, std::min(a.head.columns, begin + a.kTile), f, s.tile_refs[t], t ? sums[t - 1] : 0,
                             s.tile_refs[t] == ref ? 1 : std::exp(a.tau * (s.tile_refs[t] - ref)));
        i = last;
    }
}

template <class V, bool heated, Map map, class T>
void draw_of_rows(const DrawRows& a, Scratch& s, int64_t begin, int64_t end) {
    using S = typename V::S;
    const Transform<V, map> f(a.head);
    for (int64_t r = begin; r < end; ++r) {
        const T* x = a.logits.row<const T>(r);
        S* values = static_cast<S*>(a.values) + r * a.draws;
        int32_t* ids = a.ids + r * a.draws;
        const Weights sums = weigh_row<V, heated, map>(a, s, x, f);
        if (!std::isfinite(sums.ref)) {
            std::fill_n(ids, a.draws, -1);
            std::fill_n(values, a.draws, S(kNaN));
            a.lse[r] = a.lse_tau[r] = sums.ref;
            continue;
        }
        a.lse[r] = sums.ref + std::log(sums.plain);
        a.lse_tau[r] = a.tau * sums.ref + std::log(sums.heated);
        draw_from_tiles<V, map>(a, s, r, x, f, sums.ref);
        gather<V, map>(s, x, a.head.columns, f, values);
        for (int64_t i = 0; i < a.draws; ++i) ids[i] = int32_t(s.ids[i]);
    }
}

inline void draw_rows(const DrawRows& a, Scratch& s, int64_t begin, int64_t end) {
    visit_dtype(a.dtype, [&](auto v, auto t) {
        visit_map(a.head, [&](auto m) {
            using V = decltype(v);
            using T = decltype(t);
            (a.tau == 1 ? draw_of_rows<V, false, decltype(m)::map, T> : draw_of_rows<V, true, decltype(m)::map, T>)(a, s, begin, end);
        });
    });
}
