// h · W[id], Σ g·W[id] and the segment sums of g·h; primitives/gather_dot.py is the definition. Included inside each ISA's namespace.

// The cache lines of a later row that lie where the block now read lies in its own: rows of another page each are more than the
// hardware foresees.
template <class V, class T>
inline void prefetch_block(const T* p) {
    for (size_t byte = 0; byte < block<V> * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
}

// Bytes between the row that is asked for and the row that is read.
constexpr int64_t kAhead = 4096;

// `h` is followed by zeros up to a whole vector.
template <class V, class T>
inline typename V::S dot(const typename V::S* h, const T* x, const T* later, int64_t n) {
    using F = typename V::F;
    F sums[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    int64_t c = 0;
    for (; c + block<V> <= n; c += block<V>) {
        prefetch_block<V>(later + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] = V::fma(V::load(h + c + i * V::width), V::load(x + c + i * V::width), sums[i]);
    }
    if (c < n) prefetch_block<V>(later + c);
    for (; c < n; c += V::width) {
        T rest[V::width] = {};
        std::memcpy(rest, x + c, std::min<int64_t>(V::width, n - c) * sizeof(T));
        sums[0] = V::fma(V::load(h + c), V::load(rest), sums[0]);
    }
    return typename V::S(V::sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

template <class V, class T>
inline double sum_of_squares(const T* x, int64_t n) {
    using F = typename V::F;
    F sums[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    int64_t c = 0;
    for (; c + block<V> <= n; c += block<V>) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const F y = V::load(x + c + i * V::width);
            sums[i] = V::fma(y, y, sums[i]);
        }
    }
    for (; c < n; c += V::width) {
        T rest[V::width] = {};
        std::memcpy(rest, x + c, std::min<int64_t>(V::width, n - c) * sizeof(T));
        sums[0] = V::fma(V::load(rest), V::load(rest), sums[0]);
    }
    return V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// sum += g·x; `sum` has room for a whole vector at its end.
template <class V, class T>
inline void add_scaled(typename V::S g, const T* x, const T* later, typename V::S* sum, int64_t n) {
    const typename V::F factor = V::set(g);
    int64_t c = 0;
    for (; c + block<V> <= n; c += block<V>) {
        prefetch_block<V>(later + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            auto* to = sum + c + i * V::width;
            V::store(to, V::fma(factor, V::load(x + c + i * V::width), V::load(to)));
        }
    }
    if (c < n) prefetch_block<V>(later + c);
    for (; c < n; c += V::width) {
        T rest[V::width] = {};
        std::memcpy(rest, x + c, std::min<int64_t>(V::width, n - c) * sizeof(T));
        V::store(sum + c, V::fma(factor, V::load(rest), V::load(sum + c)));
    }
}

// Rows of T as operands of O: where that rounds nothing the row itself is read, else a copy of it.
template <class V, class O, class T>
struct Operand {
    using S = typename V::S;
    static constexpr bool exact = std::is_same<T, O>::value || (std::is_same<O, float>::value && !std::is_same<T, double>::value);
    using Read = typename std::conditional<exact, T, S>::type;

    static const Read* read(const T* x, const T* later, S* copy, int64_t n) {
        if constexpr (exact) return x;
        else return rounded(x, later, copy, n);
    }
    // what to prefetch while `Read` is read
    static const Read* following(const Read* now, const T* later) {
        if constexpr (exact) return later;
        else return now;
    }

private:
    static const S* rounded(const T* x, const T* later, S* copy, int64_t n) {
        int64_t c = 0;
        if constexpr (V::width > 1 && !std::is_same<T, double>::value) {
            for (; c + V::width <= n; c += V::width) {
                __builtin_prefetch(later + c);
                O lanes[V::width];
                V::store(lanes, V::load(x + c));
                V::store(copy + c, V::load(lanes));
            }
        }
        for (; c < n; ++c) {
            __builtin_prefetch(later + c);
            O entry;
            narrow(widen(x[c]), entry);
            copy[c] = widen(entry);
        }
        return copy;
    }
};

// The rows of `m` at consecutive ids; null where there is none.
template <class T>
struct Lookup {
    const Matrix& m;
    const Ids& ids;
    int64_t end, ahead;

    Lookup(const Matrix& m, const Ids& ids, int64_t end)
        : m(m), ids(ids), end(end), ahead(1 + kAhead / std::max<int64_t>(1, m.columns * int64_t(sizeof(T)))) {}
    const T* at(int64_t index) const {
        const int64_t id = ids.at(index);
        return id >= 0 && id < m.rows ? m.row<const T>(id) : nullptr;
    }
    const T* later(int64_t index, const T* otherwise) const {
        const T* row = index + ahead < end ? at(index + ahead) : nullptr;
        return row ? row : otherwise;
    }
};

// f(vector, operand and row types)
template <class Visitor>
inline void visit_operands(DType operand, DType rows, Visitor&& visit) {
    visit_dtype(operand, [&](auto v, auto o) { visit_dtype(rows, [&](auto, auto t) { visit(v, o, t); }); });
}

inline void gather_dot(const GatherDot& a, Scratch& s, int64_t begin, int64_t end) {
    visit_operands(a.hidden.dtype, a.weight.dtype, [&](auto v, auto o, auto t) {
        using V = decltype(v);
        using O = decltype(o);
        using T = decltype(t);
        using S = typename V::S;
        using Rows = Operand<V, O, T>;
        const int64_t n = a.weight.columns, k = a.ids.count;
        const Lookup<T> rows(a.weight, a.ids, end * k);
        S *h = s.row<S>(0), *copy = s.row<S>(1);
        for (int64_t r = begin; r < end; ++r) {
            const O* hidden = a.hidden.row<const O>(r);
            for (int64_t c = 0; c < n; ++c) h[c] = widen(hidden[c]);
            for (int64_t at = r * k; at < (r + 1) * k; ++at) {
                S product = 0;
                if (const T* x = rows.at(at)) {
                    const T* later = rows.later(at, x);
                    const auto* read = Rows::read(x, later, copy, n);
                    product = dot<V>(h, read, Rows::following(read, later), n);
                }
                static_cast<S*>(a.out)[at] = product;
            }
        }
    });
}

inline void gather_dot_hidden_grad(const GatherDotHiddenGrad& a, Scratch& s, int64_t begin, int64_t end) {
    visit_operands(a.operand, a.weight.dtype, [&](auto v, auto o, auto t) {
        using V = decltype(v);
        using O = decltype(o);
        using T = decltype(t);
        using S = typename V::S;
        using Rows = Operand<V, O, T>;
        const int64_t n = a.weight.columns, k = a.ids.count;
        const Lookup<T> rows(a.weight, a.ids, end * k);
        S *sum = s.row<S>(0), *copy = s.row<S>(1);
        for (int64_t r = begin; r < end; ++r) {
            std::fill_n(sum, n, S(0));
            for (int64_t at = r * k; at < (r + 1) * k; ++at) {
                if (const T* x = rows.at(at)) {
                    const T* later = rows.later(at, x);
                    const auto* read = Rows::read(x, later, copy, n);
                    add_scaled<V>(static_cast<const S*>(a.grad)[at], read, Rows::following(read, later), sum, n);
                }
            }
            std::memcpy(static_cast<S*>(a.out) + r * n, sum, n * sizeof(S));
        }
    });
}

// Segments that begin in [begin, end): a segment is never split.
inline void gather_dot_weight_grad(const GatherDotWeightGrad& a, Scratch& s, int64_t begin, int64_t end) {
    visit_operands(a.hidden.dtype, a.out.dtype, [&](auto v, auto o, auto t) {
        using V = decltype(v);
        using O = decltype(o);
        using T = decltype(t);
        using S = typename V::S;
        const int64_t n = a.hidden.columns;
        S* sum = s.row<S>(0);
        int64_t at = begin;
        while (at > 0 && at < end && a.targets[at] == a.targets[at - 1]) ++at;
        while (at < end) {
            const int64_t target = a.targets[at];
            const bool wanted = target >= 0 && target < a.out.rows;
            if (wanted) std::fill_n(sum, n, S(0));
            for (; at < a.pairs && a.targets[at] == target; ++at) {
                if (!wanted) continue;
                const int64_t pair = a.order[at];
                const O* h = a.hidden.row<const O>(pair / a.slots);
                const O* later = at + 1 < a.pairs ? a.hidden.row<const O>(a.order[at + 1] / a.slots) : h;
                add_scaled<V>(static_cast<const S*>(a.grad)[pair], h, later, sum, n);
            }
            if (!wanted) continue;
            T* out = a.out.row<T>(target);
            int64_t c = 0;
            if constexpr (V::width > 1 && !std::is_same<T, double>::value)
                for (; c + V::width <= n; c += V::width) V::store(out + c, V::load(sum + c));
            for (; c < n; ++c) narrow(sum[c], out[c]);
        }
    });
}
