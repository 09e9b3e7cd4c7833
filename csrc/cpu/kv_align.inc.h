// Distances of pairs of tensors, and their gradients; primitives/kv_align.py is the definition. Included inside each ISA's namespace.
//
// A pair is one item: its sums run over its rows in order, in double beyond a row, and a second look at it comes from the cache. Rows
// are float here; gradients are rounded once.

// A row of floats up to a whole vector, `fill` behind its end; the row itself where it ends with a vector.
template <class V>
inline const float* float_row(const Cache& x, int64_t b, int64_t h, int64_t m, float fill, float* copy) {
    const int64_t width = x.width;
    const float* found = copy;
    visit_narrow(x.dtype, [&](auto t) {
        using T = decltype(t);
        const T* row = x.row<const T>(b, h, m);
        if constexpr (std::is_same<T, float>::value) {
            if (width % V::width == 0) {
                found = row;
                return;
            }
        }
        int64_t d = 0;
        for (; d + V::width <= width; d += V::width) V::store(copy + d, V::load(row + d));
        for (; d < width; ++d) copy[d] = widen(row[d]);
    });
    if (found == copy) std::fill(copy + width, copy + up_to(width, V::width), fill);
    return found;
}

struct AlignedPair {
    const KvAlign& a;
    const AlignPair& p;
    float *s_row, *t_row, *grad_row;
    int64_t slots = 0;  // real ones

    int64_t elements() const { return slots * p.student.width; }

    // f(slot, b, h, m) of every slot
    template <class Visit>
    void each_slot(Visit&& visit) const {
        const Cache& s = p.student;
        for (int64_t b = 0, slot = 0; b < s.batch; ++b)
            for (int64_t h = 0; h < s.heads; ++h)
                for (int64_t m = 0; m < s.length; ++m, ++slot) visit(slot, b, h, m);
    }

    // f(slot, row of the student, row of the teacher) of every real slot
    template <class Visit>
    void each(float s_fill, float t_fill, Visit&& visit) const {
        each_slot([&](int64_t slot, int64_t b, int64_t h, int64_t m) {
            if (p.real(b, h, m)) visit(slot, float_row<Float>(p.student, b, h, m, s_fill, s_row), float_row<Float>(p.teacher, b, h, m, t_fill, t_row));
        });
    }

    // past the caches: all gradients together are larger
    void write(int64_t slot, const float* grad) const {
        const int64_t width = p.student.width;
        visit_narrow(p.student.dtype, [&](auto t) {
            using T = decltype(t);
            T* to = static_cast<T*>(p.grad) + slot * width;
            const bool stream = reinterpret_cast<uintptr_t>(to) % 64 == 0;
            int64_t d = 0;
            for (; d + Float::width <= width; d += Float::width) {
                const auto g = Float::load(grad + d);
                if (stream) Float::stream(to + d, g);
                else Float::store(to + d, g);
            }
            for (; d < width; ++d) narrow(grad[d], to[d]);
        });
    }

    // where masked, or everywhere
    void write_zeros(bool all) const {
        const int64_t bytes = p.student.width * int64_t(itemsize(p.student.dtype));
        each_slot([&](int64_t slot, int64_t b, int64_t h, int64_t m) {
            if (all || !p.real(b, h, m)) std::memset(static_cast<char*>(p.grad) + slot * bytes, 0, bytes);
        });
    }
};

struct Spread {
    double mean = 0, std = 1;
    bool clamped = false;
};

// Means and clamped unbiased standard deviations of the teacher, and of the student where wanted.
inline void spreads(const AlignedPair& pair, bool of_student, Spread& s, Spread& t) {
    using V = Float;
    const int64_t width = pair.p.student.width;
    const double n = double(std::max<int64_t>(1, pair.elements())), freedom = double(std::max<int64_t>(1, pair.elements() - 1));
    double s_sum = 0, t_sum = 0;
    const auto sum = [&](const float* x, float mean, bool squares) {
        auto all = V::set(0);
        for (int64_t d = 0; d < width; d += V::width) {
            const auto y = V::load(x + d) - V::set(mean);
            all = squares ? V::fma(y, y, all) : all + y;
        }
        return V::sum(all);
    };
    pair.each(0, 0, [&](int64_t, const float* x, const float* y) {
        if (of_student) s_sum += sum(x, 0, false);
        t_sum += sum(y, 0, false);
    });
    s.mean = s_sum / n;
    t.mean = t_sum / n;
    s_sum = t_sum = 0;
    // rows are filled with the mean, which adds nothing
    pair.each(float(s.mean), float(t.mean), [&](int64_t, const float* x, const float* y) {
        if (of_student) s_sum += sum(x, float(s.mean), true);
        t_sum += sum(y, float(t.mean), true);
    });
    const auto set = [&](Spread& spread, double squares) {
        spread.std = std::sqrt(squares / freedom);
        spread.clamped = !(spread.std > 1e-6) && !std::isnan(spread.std);
        if (spread.clamped) spread.std = 1e-6;
    };
    set(t, t_sum);
    if (of_student) set(s, s_sum);
}

// The distance of d and its slope, without the factors that all elements share.
template <Loss loss>
struct Elementwise {
    using V = Float;
    using F = V::F;
    F beta, half_inverse, inverse;

    explicit Elementwise(double b) : beta(V::set(float(b))), half_inverse(V::set(float(0.5 / b))), inverse(V::set(float(1 / b))) {}
    void operator()(F d, F& value, F& slope) const {
        const F size = V::abs(d);
        // NaN goes the way of numbers far apart, and stays NaN
        const F sign = V::select(V::gt(size, V::set(0)), V::with_sign_of(V::set(1), d), d);
        if constexpr (loss == Loss::mse) {
            value = d * d;
            slope = d + d;
        } else if constexpr (loss == Loss::l1) {
            value = size;
            slope = sign;
        } else {
            const auto near = V::gt(beta, size);
            value = V::select(near, d * d * half_inverse, size - V::set(0.5f) * beta);
            slope = V::select(near, d * inverse, sign);
        }
    }
};

template <Loss loss>
inline double align_elements(const AlignedPair& pair, double coef) {
    using V = Float;
    using F = V::F;
    const int64_t width = pair.p.student.width;
    const bool inputs = pair.a.normalize == Normalize::inputs, wanted = pair.p.grad && coef != 0;
    Spread s, t;
    if (pair.a.normalize != Normalize::none) spreads(pair, inputs, s, t);
    double scale = 1;  // of the sum and of the slopes
    if (pair.a.normalize == Normalize::layer_std) scale = 1 / (loss == Loss::mse ? t.std * t.std : t.std);
    const F s_scale = V::set(inputs ? float(1 / s.std) : 1), t_scale = V::set(inputs ? float(1 / t.std) : 1);
    const F factor = V::set(float(coef * scale * (inputs ? 1 / s.std : 1)));
    const Elementwise<loss> distance(pair.a.beta);
    const auto difference = [&](const float* x, const float* y, int64_t d) {
        return inputs ? V::load(x + d) * s_scale - V::load(y + d) * t_scale : V::load(x + d) - V::load(y + d);
    };
    double sum = 0, along = 0;  // Σ f and Σ f′·s
    pair.each(0, 0, [&](int64_t slot, const float* x, const float* y) {
        F values = V::set(0), products = V::set(0), value, slope;
        for (int64_t d = 0; d < width; d += V::width) {
            distance(difference(x, y, d), value, slope);
            values = values + value;
            if (inputs) products = V::fma(slope, V::load(x + d), products);
            else if (wanted) V::store(pair.grad_row + d, slope * factor);
        }
        sum += V::sum(values);
        if (inputs) along += V::sum(products);
        else if (wanted) pair.write(slot, pair.grad_row);
    });
    if (wanted && inputs) {
        // through the student's σ, which its every element moves
        const double through = s.clamped ? 0 : coef * along / (double(std::max<int64_t>(1, pair.elements() - 1)) * s.std * s.std * s.std);
        const F mean = V::set(float(s.mean)), less = V::set(float(-through));
        pair.each(0, 0, [&](int64_t slot, const float* x, const float* y) {
            F value, slope;
            for (int64_t d = 0; d < width; d += V::width) {
                distance(difference(x, y, d), value, slope);
                V::store(pair.grad_row + d, V::fma(V::load(x + d) - mean, less, slope * factor));
            }
            pair.write(slot, pair.grad_row);
        });
    }
    return sum * scale;
}

inline double align_directions(const AlignedPair& pair, double coef) {
    using V = Float;
    using F = V::F;
    const int64_t width = pair.p.student.width;
    double sum = 0;
    pair.each(0, 0, [&](int64_t slot, const float* x, const float* y) {
        F ss = V::set(0), tt = V::set(0), st = V::set(0);
        for (int64_t d = 0; d < width; d += V::width) {
            const F s = V::load(x + d), t = V::load(y + d);
            ss = V::fma(s, s, ss);
            tt = V::fma(t, t, tt);
            st = V::fma(s, t, st);
        }
        const double length = std::sqrt(V::sum(ss)), s_norm = std::max(length, 1e-8), t_norm = std::max(std::sqrt(V::sum(tt)), 1e-8);
        const double cosine = V::sum(st) / (s_norm * t_norm);
        sum += 1 - cosine;
        if (!pair.p.grad || coef == 0) return;
        const F own = V::set(length > 1e-8 ? float(coef * cosine / (s_norm * s_norm)) : 0), other = V::set(float(-coef / (s_norm * t_norm)));
        for (int64_t d = 0; d < width; d += V::width) V::store(pair.grad_row + d, V::fma(V::load(x + d), own, V::load(y + d) * other));
        pair.write(slot, pair.grad_row);
    });
    return sum;
}

inline void kv_align(const KvAlign& a, Scratch& scratch, int64_t begin, int64_t end) {
    const int64_t stride = up_to(a.widest() + 16, 16);
    auto* rows = reinterpret_cast<float*>(scratch.space.data());
    for (int64_t item = begin; item < end; ++item) {
        AlignedPair pair{a, a.pairs[item], rows, rows + stride, rows + 2 * stride};
        const double coef = a.coef[item];
        const Cache& s = pair.p.student;
        if (pair.p.mask) pair.each_slot([&](int64_t, int64_t b, int64_t h, int64_t m) { pair.slots += pair.p.real(b, h, m); });
        else pair.slots = s.batch * s.heads * s.length;
        if (pair.p.grad && (coef == 0 || pair.p.mask)) pair.write_zeros(coef == 0);
        switch (a.loss) {
            case Loss::mse: a.sums[item] = align_elements<Loss::mse>(pair, coef); break;
            case Loss::l1: a.sums[item] = align_elements<Loss::l1>(pair, coef); break;
            case Loss::smooth_l1: a.sums[item] = align_elements<Loss::smooth_l1>(pair, coef); break;
            case Loss::cosine: a.sums[item] = align_directions(pair, coef); break;
        }
    }
    end_of_streams();
}
