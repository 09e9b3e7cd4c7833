// One double a time, for gradcheck and as truth: accuracy, not speed. Included inside each ISA's namespace.

struct Double {
    using S = double;
    using F = double;
    using M = bool;
    static constexpr int width = 1;
    static constexpr double lowest = -746;  // e^lowest = 0

    static F set(double x) { return x; }
    static F load(const double* p) { return *p; }
    static void store(double* p, F x) { *p = x; }
    static void stream(double* p, F x) { *p = x; }
    static F fma(F a, F b, F c) { return std::fma(a, b, c); }
    static F max(F a, F b) { return a > b ? a : b; }
    static M gt(F a, F b) { return a > b; }
    static M finite(F x) { return std::isfinite(x); }
    static M nan(F x) { return x != x; }
    static F keep(M m, F x) { return m ? x : 0.0; }
    static F select(M m, F a, F b) { return m ? a : b; }
    static F abs(F x) { return std::fabs(x); }
    static unsigned bits(M m) { return m; }
    static double top(F x) { return x; }
    static double sum(F x) { return x; }
    static int pack(double* p, F x, unsigned bits) {
        *p = x;
        return int(bits);
    }
};

inline double exp_clamped(const Double&, double& d) {
    d = Double::max(Double::lowest, d);
    return std::exp(d);
}

inline double expm1_clamped(const Double&, double d) { return std::expm1(d); }

inline double tanh_of(const Double&, double x) { return std::tanh(x); }

inline double log_of(const Double&, double x) { return std::log(x); }
