// Four floats through the compiler's vector extension: SSE2 on x86-64, NEON on aarch64. Included inside namespace baseline.

struct Float {
    using S = float;
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t M __attribute__((vector_size(16)));
    static constexpr int width = 4;

    static F set(float x) { return F{x, x, x, x}; }
    static F load(const float* p) {
        F x;
        std::memcpy(&x, p, 16);
        return x;
    }
    template <class T>
    static F load(const T* p) {
        return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
    }
    static void store(float* p, F x) { std::memcpy(p, &x, 16); }
    template <class T>
    static void store(T* p, F x) {
        for (int i = 0; i < width; ++i) narrow(x[i], p[i]);
    }
    template <class T>
    static void stream(T* p, F x) {
        store(p, x);
    }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F max(F a, F b) { return a > b ? a : b; }
    // d = n·ln 2 + remainder, and p·2^n. n + 127 is in the low bits of `octaves`, so that one shift makes the power: 0 at n = −127
    // and infinity at 128, where the clamps end. Without a fused multiply-add ln 2 comes in two parts, the first exact times n.
    static constexpr float kBias = 0x1.8p23f + 127;
    static F clamp(F d) {
        d = d < set(-88) ? set(-88) : d;
        return d > set(88.8f) ? set(88.8f) : d;
    }
    static F octaves(F d) { return d * set(0x1.715476p+0f) + set(kBias); }
    static F remainder(F d, F octaves) {
        const F n = octaves - set(kBias);
        return (d - n * set(0x1.62e4p-1f)) - n * set(0x1.7f7d1cp-20f);
    }
    static F scale(F p, F octaves) { return p * (F)((M)octaves << 23); }
    // x = m·2^n, m in [¾, 1½)
    static F mantissa(F x, F& n) {
        const M bits = (M)x, octaves = (bits - 0x3f400000) >> 23;
        n = __builtin_convertvector(octaves, F);
        return (F)(bits - (octaves << 23));
    }
    static M gt(F a, F b) { return a > b; }
    static M finite(F x) { return x - x == set(0); }
    static M nan(F x) { return x != x; }
    static F keep(M m, F x) { return m ? x : set(0); }
    static F select(M m, F a, F b) { return m ? a : b; }
    static F abs(F x) { return (F)((M)x & 0x7fffffff); }
    static F with_sign_of(F x, F sign) { return (F)((M)x | ((M)sign & int32_t(0x80000000))); }
    static unsigned bits(M m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
    static float top(F x) {
        const float low = x[0] > x[1] ? x[0] : x[1], high = x[2] > x[3] ? x[2] : x[3];
        return low > high ? low : high;
    }
    static double sum(F x) { return (double(x[0]) + double(x[1])) + (double(x[2]) + double(x[3])); }
    // The lanes of `bits`, packed; as much as a whole vector may be written. How many they are.
    static int pack(float* p, F x, unsigned bits) {
        int count = 0;
        for (int i = 0; i < width; ++i) {
            p[count] = x[i];
            count += bits >> i & 1;
        }
        return count;
    }
};

inline void end_of_streams() {}
