// Sixteen floats. Included inside namespaces avx512 and avx512bf16; the latter rounds to bfloat16 in one instruction instead of eight.

struct Float {
    using S = float;
    using F = __m512;
    using M = __mmask16;
    static constexpr int width = 16;

    static F set(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
    static F load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static void store(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
    static void store(f16* p, F x) { _mm256_storeu_si256((__m256i*)p, to_f16(x)); }
    static void stream(float* p, F x) { _mm512_stream_ps(p, x); }
    static void stream(bf16* p, F x) { _mm256_stream_si256((__m256i*)p, to_bf16(x)); }
    static void stream(f16* p, F x) { _mm256_stream_si256((__m256i*)p, to_f16(x)); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    // d = n·ln 2 + remainder, and p·2^n. A float ln 2 is off by 2e-9: 2e-7 of the result at the smallest.
    static F clamp(F d) { return max(set(-104), d); }
    static F octaves(F d) { return _mm512_roundscale_ps(d * set(0x1.715476p+0f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F remainder(F d, F n) { return fma(n, set(-0x1.62e43p-1f), d); }
    static F scale(F p, F n) { return _mm512_scalef_ps(p, n); }
    // x = m·2^n, m in [¾, 1½)
    static F mantissa(F x, F& n) {
        const __m512i bits = _mm512_castps_si512(x), octaves = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f400000)), 23);
        n = _mm512_cvtepi32_ps(octaves);
        return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(octaves, 23)));
    }
    static M gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static M finite(F x) { return _mm512_cmp_ps_mask(abs(x), set(std::numeric_limits<float>::infinity()), _CMP_LT_OQ); }
    static M nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
    static F keep(M m, F x) { return _mm512_maskz_mov_ps(m, x); }
    static F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
    static F abs(F x) { return _mm512_andnot_ps(set(-0.0f), x); }
    static F with_sign_of(F x, F sign) { return _mm512_or_ps(x, _mm512_and_ps(set(-0.0f), sign)); }
    static unsigned bits(M m) { return m; }
    static float top(F x) { return _mm512_reduce_max_ps(x); }
    static double sum(F x) {
        return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))));
    }

    // The lanes of `bits`, packed; a whole vector is written. How many they are.
    static int pack(float* p, F x, unsigned bits) {
        _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(bits), x));
        return __builtin_popcount(bits);
    }

    typedef uint32_t U __attribute__((vector_size(64)));
    static U load(const uint32_t* p) { return (U)_mm512_loadu_si512(p); }
    static void multiply(U x, uint32_t factor, U& high, U& low) {
        const __m512i all = _mm512_set1_epi64(factor), even = _mm512_mul_epu32((__m512i)x, all),
                      odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), all);
        high = (U)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
        low = (U)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    }
    static F real(U x) { return _mm512_cvtepu32_ps((__m512i)x); }
    // In each 128 bits, word j of vector i to word i of vector j.
    static void transpose(F (&x)[4]) {
        const F a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]), c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
        x[0] = low_pairs(a, c), x[1] = high_pairs(a, c), x[2] = low_pairs(b, d), x[3] = high_pairs(b, d);
    }

private:
    static F low_pairs(F a, F b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
    static F high_pairs(F a, F b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
    static __m256i to_f16(F x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#if defined(DISTILKERNELS_NATIVE_BF16)
    static __m256i to_bf16(F x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
    static __m256i to_bf16(F x) {
        const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
    }
#endif
};

inline void end_of_streams() { _mm_sfence(); }
