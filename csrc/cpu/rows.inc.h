// exp, tanh, the head's transform, and a row read by blocks. Included inside each ISA's namespace.

// e^d, to 2e-7. d is clamped from below where e^d = 0, which also makes e·d = 0 at d = −inf; NaN stays NaN.
// Above the range of a float the result is not finite, or negative: callers that can get there check.
template <class V>
inline typename V::F exp_clamped(const V&, typename V::F& d) {
    d = V::clamp(d);
    const auto octaves = V::octaves(d);
    const auto f = V::remainder(d, octaves);
    // minimax on ±½ ln 2 with 1 + f kept exact: 1e-7
    auto p = V::set(8.312501289e-03f);
    p = V::fma(p, f, V::set(4.189033157e-02f));
    p = V::fma(p, f, V::set(1.666711539e-01f));
    p = V::fma(p, f, V::set(4.999923031e-01f));
    p = V::fma(p, f, V::set(1));
    p = V::fma(p, f, V::set(1));
    return V::scale(p, octaves);
}

// e^d − 1 for d ≤ 0, to 1e-7 of itself: what is left of 1 after 2^n − 1 comes from the polynomial without its 1.
template <class V>
inline typename V::F expm1_clamped(const V&, typename V::F d) {
    d = V::clamp(d);
    const auto octaves = V::octaves(d);
    const auto f = V::remainder(d, octaves);
    auto p = V::set(8.312501289e-03f);
    p = V::fma(p, f, V::set(4.189033157e-02f));
    p = V::fma(p, f, V::set(1.666711539e-01f));
    p = V::fma(p, f, V::set(4.999923031e-01f));
    p = V::fma(p * f, f, f);
    const auto power = V::scale(V::set(1), octaves);
    return V::fma(p, power, power - V::set(1));
}

// Small relative error everywhere: an odd polynomial (4e-9) below 0.625, 1 − 2/(e^{2x} + 1) beyond.
template <class V>
inline typename V::F tanh_of(const V& v, typename V::F x) {
    const auto magnitude = V::abs(x);
    const auto square = x * x;
    auto p = V::set(-5.704226844e-03f);
    p = V::fma(p, square, V::set(2.063843422e-02f));
    p = V::fma(p, square, V::set(-5.373952397e-02f));
    p = V::fma(p, square, V::set(1.333144003e-01f));
    p = V::fma(p, square, V::set(-3.333328187e-01f));
    const auto small = V::fma(p * square, x, x);
    // tanh 10 is 1 to a float; −max(−a, −b) is a minimum that keeps NaN
    auto twice = -V::max(V::set(-20), -(magnitude + magnitude));
    const auto large = V::set(1) - V::set(2) / (exp_clamped(v, twice) + V::set(1));
    return V::select(V::gt(V::set(0.625f), magnitude), small, V::with_sign_of(large, x));
}

// log x to 1e-7 for x > 0 that is no denormal: x = m·2^n with m in [¾, 1½), and a minimax polynomial (4e-8) for log m.
template <class V>
inline typename V::F log_of(const V&, typename V::F x) {
    typename V::F n;
    const auto f = V::mantissa(x, n) - V::set(1);
    auto p = V::set(5.413162528e-02f);
    p = V::fma(p, f, V::set(-1.206730478e-01f));
    p = V::fma(p, f, V::set(1.498392023e-01f));
    p = V::fma(p, f, V::set(-1.682282028e-01f));
    p = V::fma(p, f, V::set(1.997707724e-01f));
    p = V::fma(p, f, V::set(-2.499344189e-01f));
    p = V::fma(p, f, V::set(3.333354857e-01f));
    p = V::fma(p, f, V::set(-5.000006065e-01f));
    p = V::fma(p, f * f, f);
    return V::fma(n, V::set(0x1.62e43p-1f), p);
}

enum class Map { plain, affine, softcap };

inline Map map_of(const Head& head) {
    if (head.softcap != 0) return Map::softcap;
    return head.scale == 1 && head.temperature == 1 ? Map::plain : Map::affine;
}

// x → z, T·z and the factor of dz/dx that is not constant. The plain PyTorch order of roundings where there is no tanh,
// so that thresholds computed there compare exactly.
template <class V, Map map>
struct Transform {
    using F = typename V::F;

    // A constant in two parts: its product with a finite x is rounded once. At |z| = 24 a second rounding is 1e-6 of the gradient.
    struct Constant {
        F high, low;
        explicit Constant(double c) : high(V::set(c)), low(V::set(c - double(typename V::S(c)))) {}
        F times(F x) const { return V::fma(x, high, x * low); }
    };
    F scale, temperature, softcap;
    Constant cap, cap_over_t;

    explicit Transform(const Head& head)
        : scale(V::set(head.scale)),
          temperature(V::set(head.temperature)),
          softcap(V::set(head.softcap)),
          cap(head.softcap),
          cap_over_t(head.softcap / head.temperature) {}

    struct Point {
        F z, at_t1, slope;
    };
    Point at(F x) const {
        if constexpr (map == Map::plain) return {x, x, V::set(1)};
        if constexpr (map == Map::affine) return {x * scale / temperature, x * scale, V::set(1)};
        const F t = tanh_of(V(), x * scale / softcap);
        return {cap_over_t.times(t), cap.times(t), V::fma(-t, t, V::set(1))};
    }
    F z(F x) const { return at(x).z; }
};

// A row is read in blocks of four vectors; no block crosses a word of the bitmap of hidden columns.
template <class V>
constexpr int block = 4 * V::width;

template <class V>
[[gnu::noinline]] void hide(typename V::F (&z)[4], uint64_t columns) {
    typename V::S lanes[block<V>];
    for (int i = 0; i < 4; ++i) V::store(lanes + i * V::width, z[i]);
    for (; columns; columns &= columns - 1) lanes[__builtin_ctzll(columns)] = -std::numeric_limits<typename V::S>::infinity();
    for (int i = 0; i < 4; ++i) z[i] = V::load(lanes + i * V::width);
}

// z of columns [c, c + block), −inf on hidden columns and from `end` on; whether there were none.
template <class V, Map map, class T>
inline bool load_block(typename V::F (&z)[4], const T* x, int64_t c, int64_t end, const uint64_t* hidden, const Transform<V, map>& f) {
    uint64_t gone = hidden[c / 64] >> (c % 64);
    if (end - c >= block<V>) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) z[i] = f.z(V::load(x + c + i * V::width));
    } else {
        T rest[block<V>] = {};
        std::memcpy(rest, x + c, (end - c) * sizeof(T));
        for (int i = 0; i < 4; ++i) z[i] = f.z(V::load(rest + i * V::width));
        gone |= ~uint64_t(0) << (end - c);
    }
    gone &= ~uint64_t(0) >> (64 - block<V>);
    if (__builtin_expect(gone != 0, 0)) {
        // a copy, so that the vectors themselves need no memory
        typename V::F some[4] = {z[0], z[1], z[2], z[3]};
        hide<V>(some, gone);
        for (int i = 0; i < 4; ++i) z[i] = some[i];
        return false;
    }
    return true;
}

// f(z-type tag) with the vector and element types of a dtype.
template <class Visitor>
inline void visit_dtype(DType dtype, Visitor&& visit) {
    switch (dtype) {
        case DType::f32: return visit(Float(), float());
        case DType::bf16: return visit(Float(), bf16());
        case DType::f16: return visit(Float(), f16());
        case DType::f64: return visit(Double(), double());
    }
}

template <Map m>
struct MapTag {
    static constexpr Map map = m;
};

template <class Visitor>
inline void visit_map(const Head& head, Visitor&& visit) {
    switch (map_of(head)) {
        case Map::plain: return visit(MapTag<Map::plain>());
        case Map::affine: return visit(MapTag<Map::affine>());
        case Map::softcap: return visit(MapTag<Map::softcap>());
    }
}
