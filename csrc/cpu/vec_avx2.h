// Eight floats. Included inside namespace avx2.

struct Float {
    using S = float;
    using F = __m256;
    using M = __m256;
    static constexpr int width = 8;

    static F set(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load(const bf16* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)); }
    static F load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static void store(bf16* p, F x) { _mm_storeu_si128((__m128i*)p, to_bf16(x)); }
    static void store(f16* p, F x) { _mm_storeu_si128((__m128i*)p, to_f16(x)); }
    static void stream(float* p, F x) { _mm256_stream_ps(p, x); }
    static void stream(bf16* p, F x) { _mm_stream_si128((__m128i*)p, to_bf16(x)); }
    static void stream(f16* p, F x) { _mm_stream_si128((__m128i*)p, to_f16(x)); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    // d = n·ln 2 + remainder, and p·2^n. n + 127 is in the low bits of `octaves`, so that one shift makes the power: 0 at n = −127
    // and infinity at 128, where the clamps end. A float ln 2 is off by 2e-9: 2e-7 of the result at the smallest.
    static constexpr float kBias = 0x1.8p23f + 127;
    static F clamp(F d) { return _mm256_min_ps(set(88.8f), max(set(-88), d)); }
    static F octaves(F d) { return fma(d, set(0x1.715476p+0f), set(kBias)); }
    static F remainder(F d, F octaves) { return fma(octaves - set(kBias), set(-0x1.62e43p-1f), d); }
    static F scale(F p, F octaves) { return p * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(octaves), 23)); }
    // x = m·2^n, m in [¾, 1½)
    static F mantissa(F x, F& n) {
        const __m256i bits = _mm256_castps_si256(x), octaves = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000)), 23);
        n = _mm256_cvtepi32_ps(octaves);
        return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(octaves, 23)));
    }
    static M gt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
    static M finite(F x) { return _mm256_cmp_ps(abs(x), set(std::numeric_limits<float>::infinity()), _CMP_LT_OQ); }
    static M nan(F x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
    static F keep(M m, F x) { return _mm256_and_ps(m, x); }
    static F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
    static F abs(F x) { return _mm256_andnot_ps(set(-0.0f), x); }
    static F with_sign_of(F x, F sign) { return _mm256_or_ps(x, _mm256_and_ps(set(-0.0f), sign)); }
    static unsigned bits(M m) { return unsigned(_mm256_movemask_ps(m)); }
    static double sum(F x) {
        const __m256d pairs = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }

private:
    static __m128i to_f16(F x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static __m128i to_bf16(F x) {
        const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }
};

inline void end_of_streams() { _mm_sfence(); }
