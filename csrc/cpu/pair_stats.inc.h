// Statistics of pairs of rows, and d logits from them; primitives/pair_stats.py is the definition. Included inside each ISA's namespace.
//
// Both rows are transformed piece by piece into buffers that stay in the first-level cache: one loop then serves every pair
// of dtypes and heads, and a piece's maximum is known before its exponentials are taken.

// z of x[begin, begin + n) into `out`, −inf up to a whole vector; returns the largest (NaN is passed over).
template <class V, Map map, class T>
double fill_as(typename V::S* out, const T* x, int64_t n, const Head& head) {
    using F = typename V::F;
    const Transform<V, map> f(head);
    F top = V::set(-kInf);
    int64_t c = 0;
    for (; c + V::width <= n; c += V::width) {
        const F z = f.z(V::load(x + c));
        V::store(out + c, z);
        top = V::max(z, top);
    }
    if (c < n) {
        T lanes[V::width] = {};
        std::memcpy(lanes, x + c, (n - c) * sizeof(T));
        V::store(out + c, f.z(V::load(lanes)));
        for (int64_t i = n; i < c + V::width; ++i) out[i] = -std::numeric_limits<typename V::S>::infinity();
        top = V::max(V::load(out + c), top);
    }
    return V::top(top);
}

template <class V>
double fill(typename V::S* out, DType dtype, const Rows& rows, int64_t r, int64_t begin, int64_t n, const Head& head) {
    double top = -kInf;
    visit_dtype(dtype, [&](auto v, auto t) {
        if constexpr (std::is_same_v<decltype(v), V>) {
            using T = decltype(t);
            const T* x = rows.row<const T>(r) + begin;
            visit_map(head, [&](auto m) { top = fill_as<V, decltype(m)::map, T>(out, x, n, head); });
        }
    });
    return top;
}

// Σ e^d and Σ e^d·d of one row, d = z − ref; Σ e^d·(z − the other row's z − between), see PairSums.
struct Side {
    double ref = 0, exp = 0, exp_d = 0, gap = 0;
    bool started = false;

    // The reference follows the maximum from eight below it: exponentials that count stay where z − ref rounds to 5e-7.
    bool moves(double top) const { return top > -kInf && (!started || top > ref + 8); }

    void move(double top) {
        const double shift = ref - top, factor = started ? std::exp(shift) : 0;
        if (exp != 0) {
            gap = factor == 0 ? 0 : factor * gap;
            exp_d = factor == 0 ? 0 : factor * (exp_d + shift * exp);
            exp *= factor;
        }
        ref = top;
        started = true;
    }
};

// Gaps are t − z less the distance of the references: of close rows the first difference is exact and the second small.
struct PairSums {
    Side p, q;
    double between = 0;

    template <class V>
    void move(double t_top, double z_top) {
        const bool p_moves = p.moves(t_top), q_moves = q.moves(z_top);
        if (!p_moves && !q_moves) return;
        if (p_moves) p.move(t_top);
        if (q_moves) q.move(z_top);
        const double next = double(typename V::S(p.ref - q.ref));
        p.gap += p.exp * (between - next);
        q.gap += q.exp * (next - between);
        between = next;
    }
};

template <class V>
void add_piece(PairSums& pair, const typename V::S* t, const typename V::S* z, int64_t n) {
    using F = typename V::F;
    Side &p = pair.p, &q = pair.q;
    const F zero = V::set(0), t_ref = V::set(p.ref), z_ref = V::set(q.ref), between = V::set(pair.between);
    F p_exp[2] = {zero, zero}, p_d[2] = {zero, zero}, p_gap[2] = {zero, zero};
    F q_exp[2] = {zero, zero}, q_d[2] = {zero, zero}, q_gap[2] = {zero, zero};
    for (int64_t c = 0; c < n; c += 2 * V::width) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const F at_t = V::load(t + c + i * V::width), at_z = V::load(z + c + i * V::width);
            F dt = at_t - t_ref, dz = at_z - z_ref;
            // of the logits themselves: a clamped distance would hide a row that gives nothing to what the other holds likely
            const F gap = (at_t - at_z) - between;
            const F et = exp_clamped(V(), dt), ez = exp_clamped(V(), dz);
            p_exp[i] = p_exp[i] + et;
            q_exp[i] = q_exp[i] + ez;
            p_d[i] = V::fma(et, dt, p_d[i]);
            q_d[i] = V::fma(ez, dz, q_d[i]);
            p_gap[i] = p_gap[i] + V::keep(V::gt(et, zero), et * gap);
            q_gap[i] = q_gap[i] - V::keep(V::gt(ez, zero), ez * gap);
        }
    }
    p.exp += V::sum(p_exp[0] + p_exp[1]);
    p.exp_d += V::sum(p_d[0] + p_d[1]);
    p.gap += V::sum(p_gap[0] + p_gap[1]);
    q.exp += V::sum(q_exp[0] + q_exp[1]);
    q.exp_d += V::sum(q_d[0] + q_d[1]);
    q.gap += V::sum(q_gap[0] + q_gap[1]);
}

// Σ e^{T·z − ref} of a piece.
template <class V>
double unheated_piece(const typename V::S* z, int64_t n, double temperature, double ref) {
    const auto t = V::set(temperature), reference = V::set(ref);
    auto sum = V::set(0);
    for (int64_t c = 0; c < n; c += V::width) {
        auto d = V::load(z + c) * t - reference;
        sum = sum + exp_clamped(V(), d);
    }
    return V::sum(sum);
}

// p, q, log p/m, log q/m and r = (1 − w)·q/m at an entry of the mixture m = w·p + (1 − w)·q, from log p and log q. Counted from the
// larger of the two: m over it lies in [min(w, 1 − w), 1], whose logarithm is exact where p and q are close.
template <class V>
struct Mixed {
    using F = typename V::F;
    F p, q, log_p, log_q, r;
    typename V::M counts;  // not where both are zero

    Mixed(F log_of_p, F log_of_q, F w, F rest) {
        const F gap = log_of_p - log_of_q, one = V::set(1);
        const auto teachers = V::gt(gap, V::set(0));
        F top = V::max(log_of_p, log_of_q), below = -V::abs(gap);
        const F high = exp_clamped(V(), top);
        counts = V::gt(high, V::set(0));
        below = V::keep(counts, below);
        const F ratio = exp_clamped(V(), below);
        const F share = V::select(teachers, w, rest), other = V::select(teachers, rest, w);
        const F mass = V::fma(other, ratio, share), log_mass = log_of(V(), mass);
        const F low = high * ratio;
        p = V::select(teachers, high, low);
        q = V::select(teachers, low, high);
        log_p = V::select(teachers, -log_mass, below - log_mass);
        log_q = V::select(teachers, below - log_mass, -log_mass);
        r = rest * V::select(teachers, ratio, one) / mass;
    }
};

// The row's double as two numbers whose sum it is.
template <class V>
struct TwoParts {
    typename V::F high, low;
    explicit TwoParts(double x) : high(V::set(x)), low(V::set(std::isfinite(double(typename V::S(x))) ? x - double(typename V::S(x)) : 0)) {}
    typename V::F before(typename V::F z) const { return (z - high) - low; }
};

// p^w·q^{1−w} at an entry, from log p and log q. Counted from the larger of the two: the exponent of the smaller takes the gap.
template <class V>
struct Powers {
    using F = typename V::F;
    F w, rest, nowhere = V::set(-kInf), limit = V::set(std::log(std::numeric_limits<typename V::S>::max())), endless = V::set(kInf);

    explicit Powers(double w) : w(V::set(w)), rest(V::set(1 - w)) {}

    // the exponent of the smaller, and whether there is anything
    F share(F gap) const { return V::select(V::gt(gap, V::set(0)), rest, w); }

    F at(F log_p, F log_q) const {
        const F gap = log_p - log_q, top = V::max(log_p, log_q);
        F log_power = V::fma(-share(gap), V::abs(gap), top);
        const auto above = V::gt(log_power, limit);
        return V::keep(V::gt(top, nowhere), V::select(above, endless, exp_clamped(V(), log_power)));
    }

    // w·p + (1 − w)·q − p^w·q^{1−w}; for w in (0, 1) such that close numbers do not cancel
    template <bool within>
    F lack(F log_p, F log_q) const {
        const F gap = log_p - log_q;
        F top = V::max(log_p, log_q);
        const auto counts = V::gt(top, nowhere);
        const F below = V::keep(counts, -V::abs(gap)), smaller = share(gap), high = exp_clamped(V(), top), drop = expm1_clamped(V(), below);
        if constexpr (within) return V::keep(counts, high * V::fma(smaller, drop, -expm1_clamped(V(), smaller * below)));
        return V::keep(counts, V::fma(high * smaller, drop, high) - at(log_p, log_q));
    }
};

// |p − q| at an entry, and what is of it in the gradient: q·sign(q − p).
template <class V>
struct Apart {
    using F = typename V::F;
    F value, slope;

    Apart(F log_p, F log_q) {
        const F gap = log_p - log_q, zero = V::set(0);
        F top = V::max(log_p, log_q);
        const F high = exp_clamped(V(), top);
        const auto counts = V::gt(high, zero), teachers = V::gt(gap, zero), students = V::gt(zero, gap);
        value = -(high * expm1_clamped(V(), V::keep(counts, -V::abs(gap))));
        slope = V::select(teachers, value - high, V::keep(students, high));
    }
};

// (p − q)·log(p/q) at an entry, and what is of it in the gradient: q·r·log(q/p), r = q/(p + q).
template <class V>
struct Balance {
    using F = typename V::F;
    F value, slope;

    Balance(F log_p, F log_q) {
        const F gap = log_p - log_q, zero = V::set(0), one = V::set(1);
        F top = V::max(log_p, log_q);
        const F high = exp_clamped(V(), top);
        const auto counts = V::gt(high, zero), teachers = V::gt(gap, zero);
        F below = V::keep(counts, -V::abs(gap)), near = below;  // each call clamps its own
        const F drop = expm1_clamped(V(), near), ratio = drop + one;
        value = V::keep(counts, high * drop * below);
        const F students_less = V::keep(V::gt(ratio, zero), ratio * ratio * below);  // 0 times −inf
        slope = V::keep(counts, high * V::select(teachers, students_less, -below) / (one + ratio));
    }
};

// Σ w·p + (1 − w)·q − p^w·q^{1−w} of a piece, added to `sums`.
template <class V, bool within>
void add_powers(double* sums, const typename V::S* t, const typename V::S* z, int64_t n, const TwoParts<V>& teacher_lse, const TwoParts<V>& lse, double w) {
    const Powers<V> powers(w);
    auto lack = V::set(0);
    for (int64_t c = 0; c < n; c += V::width) {
        lack = lack + powers.template lack<within>(teacher_lse.before(V::load(t + c)), lse.before(V::load(z + c)));
    }
    sums[0] += V::sum(lack);
}

// Σ value and Σ slope of a piece, added to the first and last of `sums`.
template <class V, class Entry>
void add_entries(double* sums, const typename V::S* t, const typename V::S* z, int64_t n, const TwoParts<V>& teacher_lse, const TwoParts<V>& lse) {
    auto value = V::set(0), slope = value;
    for (int64_t c = 0; c < n; c += V::width) {
        const Entry at(teacher_lse.before(V::load(t + c)), lse.before(V::load(z + c)));
        value = value + at.value;
        slope = slope + at.slope;
    }
    sums[0] += V::sum(value);
    sums[3] += V::sum(slope);
}

// Σ p·log p/m, Σ q·log q/m, Σ p·r and Σ q·r of a piece, added to `sums`.
template <class V>
void add_mixture(double* sums, const typename V::S* t, const typename V::S* z, int64_t n, const TwoParts<V>& teacher_lse, const TwoParts<V>& lse, double w) {
    using F = typename V::F;
    const F weight = V::set(w), rest = V::set(1 - w);
    F to_p = V::set(0), to_q = to_p, p_r = to_p, q_r = to_p;
    for (int64_t c = 0; c < n; c += V::width) {
        const Mixed<V> at(teacher_lse.before(V::load(t + c)), lse.before(V::load(z + c)), weight, rest);
        to_p = to_p + V::keep(at.counts, at.p * at.log_p);
        to_q = to_q + V::keep(at.counts, at.q * at.log_q);
        p_r = p_r + V::keep(at.counts, at.p * at.r);
        q_r = q_r + V::keep(at.counts, at.q * at.r);
    }
    sums[0] += V::sum(to_p);
    sums[1] += V::sum(to_q);
    sums[2] += V::sum(p_r);
    sums[3] += V::sum(q_r);
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The end of a piece that `fill` padded to one vector, padded to two.
template <class V>
void pad_pair(typename V::S* z, int64_t n) {
    for (int64_t c = round_up(n, V::width); c < round_up(n, 2 * V::width); c += V::width) V::store(z + c, V::set(-kInf));
}

template <class V>
void pair_rows(const PairStats& a, Scratch& s, int64_t begin, int64_t end) {
    using S = typename V::S;
    S *t = s.row<S>(0), *z = s.row<S>(1);
    const int64_t columns = a.head.columns;
    const double temperature = a.head.temperature;
    for (int64_t r = begin; r < end; ++r) {
        PairSums pair;
        const Side &p = pair.p, &q = pair.q;
        double t1 = 0, t1_ref = 0;
        bool t1_started = false;
        for (int64_t c = 0; c < columns; c += kPiece) {
            const int64_t n = std::min(kPiece, columns - c);
            const double t_top = fill<V>(t, a.teacher_dtype, a.teacher, r, c, n, a.teacher_head);
            const double z_top = fill<V>(z, a.dtype, a.logits, r, c, n, a.head);
            pad_pair<V>(t, n);
            pad_pair<V>(z, n);
            pair.move<V>(t_top, z_top);
            add_piece<V>(pair, t, z, n);
            if (a.with_t1) {
                const double top = z_top * temperature;
                if (top > -kInf && (!t1_started || top > t1_ref + 8)) {
                    t1 = t1 == 0 ? 0 : t1 * std::exp(t1_ref - top);
                    t1_ref = top;
                    t1_started = true;
                }
                t1 += unheated_piece<V>(z, n, temperature, t1_ref);
            }
        }
        // a row of −inf alone has no distribution
        const double lse = q.exp == 0 ? -kInf : q.ref + std::log(q.exp), teacher_lse = p.exp == 0 ? -kInf : p.ref + std::log(p.exp);
        const bool ok = !std::isnan(p.exp) && !std::isnan(q.exp);
        double* out = a.out + kPairStats * r;
        out[0] = lse;
        out[1] = teacher_lse;
        out[2] = ok ? p.gap / p.exp + pair.between : kNaN;
        out[3] = ok ? q.gap / q.exp - pair.between : kNaN;
        out[4] = q.exp_d / q.exp + q.ref;
        out[5] = p.exp_d / p.exp + p.ref;
        out[6] = !a.with_t1 ? lse : t1 == 0 ? -kInf : t1_ref + std::log(t1);
        std::fill_n(out + 7, 4, ok ? 0.0 : kNaN);
        if (a.second == Second::none || !ok) continue;
        // the lse come first; the rows are then still in the second or third level of the cache
        const TwoParts<V> before_q(lse), before_p(teacher_lse);
        const double w = a.w[r];
        const auto powers = w > 0 && w < 1 ? add_powers<V, true> : add_powers<V, false>;
        for (int64_t c = 0; c < columns; c += kPiece) {
            const int64_t n = std::min(kPiece, columns - c);
            fill<V>(t, a.teacher_dtype, a.teacher, r, c, n, a.teacher_head);
            fill<V>(z, a.dtype, a.logits, r, c, n, a.head);
            if (a.second == Second::mixture) add_mixture<V>(out + 7, t, z, n, before_p, before_q, w);
            else if (a.second == Second::power) powers(out + 7, t, z, n, before_p, before_q, w);
            else if (a.second == Second::distance) add_entries<V, Apart<V>>(out + 7, t, z, n, before_p, before_q);
            else add_entries<V, Balance<V>>(out + 7, t, z, n, before_p, before_q);
        }
    }
}

inline void pair_stats(const PairStats& a, Scratch& s, int64_t begin, int64_t end) {
    (a.dtype == DType::f64 ? pair_rows<Double> : pair_rows<Float>)(a, s, begin, end);
}

// A row's coefficients, broadcast.
template <class V, bool softcap, bool with_t1, Second second>
struct PairGradient {
    using F = typename V::F;
    TwoParts<V> lse, teacher, t1;
    F a, b, c, d, e, f, g, h, weight, rest, temperature, over_cap, zero;
    Powers<V> powers;
    typename V::M with_gap;  // a gap that nothing is asked of may be infinite

    PairGradient(const Head& head, const double* coef, double slope)
        : lse(coef[0]),
          teacher(coef[1]),
          t1(coef[7]),
          a(V::set(coef[2] * slope)),
          b(V::set(coef[3] * slope)),
          c(V::set(coef[4] * slope)),
          d(V::set(coef[5] * slope)),
          e(V::set(coef[6] * slope)),
          f(V::set(coef[8] * slope)),
          g(V::set(coef[9] * slope)),
          h(V::set(coef[10] * slope)),
          weight(V::set(coef[11])),
          rest(V::set(1 - coef[11])),
          temperature(V::set(head.temperature)),
          over_cap(V::set(softcap ? head.temperature / head.softcap : 0)),
          zero(V::set(0)),
          powers(coef[11]),
          with_gap(V::gt(V::abs(c), zero)) {}

    F at(F z, F t) const {
        F dz = lse.before(z), dt = teacher.before(t);
        const F gap = V::keep(with_gap, dz - dt);
        F p, q, found = zero;
        if constexpr (second == Second::mixture) {
            const Mixed<V> m(dt, dz, weight, rest);
            found = V::keep(m.counts, V::fma(f * m.p, m.r, m.q * V::fma(g, m.log_q, h * m.r)));
            p = m.p;
            q = m.q;
        } else {
            if constexpr (second == Second::power) found = f * powers.at(dt, dz);
            if constexpr (second == Second::distance) found = f * Apart<V>(dt, dz).slope;
            if constexpr (second == Second::balance) found = f * Balance<V>(dt, dz).slope;
            q = exp_clamped(V(), dz);
            p = exp_clamped(V(), dt);
        }
        found = found + V::keep(V::gt(q, zero), q * V::fma(c, gap, V::fma(b, dz, a)));
        found = V::fma(d, p, found);
        if constexpr (with_t1) {
            F d1 = t1.before(z * temperature);
            found = V::fma(e, exp_clamped(V(), d1), found);
        }
        if constexpr (softcap) {
            const F y = z * over_cap;
            found = found * V::fma(-y, y, V::set(1));
        }
        return found;
    }
};

template <class V, bool softcap, bool with_t1, Second second, class T>
void pair_gradient_rows(const PairStatsBackward& a, Scratch& s, int64_t begin, int64_t end) {
    using S = typename V::S;
    S *t = s.row<S>(0), *z = s.row<S>(1);
    const int64_t columns = a.head.columns, vocab = a.logits.vocab;
    const double slope = a.head.scale / a.head.temperature;
    // a fresh gradient is not read back: writing around the cache saves reading its lines first
    const bool fresh = a.out.data != a.logits.data;
    for (int64_t r = begin; r < end; ++r) {
        const double* coef = a.coef + kPairCoefficients * r;
        T* out = a.out.row<T>(r);
        const auto zero = [](double x) { return x == 0; };
        if (std::all_of(coef + 2, coef + 7, zero) && std::all_of(coef + 8, coef + 11, zero)) {
            std::memset(static_cast<void*>(out), 0, vocab * sizeof(T));
            continue;
        }
        const PairGradient<V, softcap, with_t1, second> gradient(a.head, coef, slope);
        // a row with nothing but its cross-entropy asks nothing of its teacher, which may hold anything
        const bool reads_teacher = coef[4] != 0 || coef[5] != 0 || !std::all_of(coef + 8, coef + 11, zero);
        if (!reads_teacher) std::fill_n(t, kPiece, S(coef[1]));
        const int64_t lead = fresh ? int64_t((64 - reinterpret_cast<uintptr_t>(out) % 64) % 64 / sizeof(T)) : 0;
        for (int64_t c = 0, n; c < columns; c += n) {
            n = std::min(c == 0 && lead > 0 ? lead : kPiece, columns - c);
            const bool stream = fresh && reinterpret_cast<uintptr_t>(out + c) % 64 == 0;
            fill<V>(z, a.dtype, a.logits, r, c, n, a.head);
            if (reads_teacher) fill<V>(t, a.teacher_dtype, a.teacher, r, c, n, a.teacher_head);
            int64_t i = 0;
            for (; i + V::width <= n; i += V::width) {
                const auto g = gradient.at(V::load(z + i), V::load(t + i));
                if (stream) V::stream(out + c + i, g);
                else V::store(out + c + i, g);
            }
            if (i < n) {
                T lanes[V::width];
                V::store(lanes, gradient.at(V::load(z + i), V::load(t + i)));
                std::memcpy(out + c + i, lanes, (n - i) * sizeof(T));
            }
        }
        std::memset(static_cast<void*>(out + columns), 0, (vocab - columns) * sizeof(T));
    }
    if (fresh) end_of_streams();
}

inline void pair_stats_backward(const PairStatsBackward& a, Scratch& s, int64_t begin, int64_t end) {
    const auto with = [](bool flag, auto&& visit) { return flag ? visit(std::true_type()) : visit(std::false_type()); };
    visit_dtype(a.dtype, [&](auto v, auto t) {
        with(a.head.softcap != 0, [&](auto softcap) {
            with(a.with_t1, [&](auto t1) {
                const auto run = [&](auto second) { pair_gradient_rows<decltype(v), softcap.value, t1.value, second.value, decltype(t)>(a, s, begin, end); };
                switch (a.second) {
                    case Second::none: return run(std::integral_constant<Second, Second::none>());
                    case Second::mixture: return run(std::integral_constant<Second, Second::mixture>());
                    case Second::power: return run(std::integral_constant<Second, Second::power>());
                    case Second::distance: return run(std::integral_constant<Second, Second::distance>());
                    case Second::balance: return run(std::integral_constant<Second, Second::balance>());
                }
            });
        });
    });
}
