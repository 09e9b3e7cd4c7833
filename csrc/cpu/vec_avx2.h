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
    static float top(F x) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static double sum(F x) {
        const __m256d pairs = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }

    // The lanes of `bits`, packed; a whole vector is written. How many they are.
    static int pack(float* p, F x, unsigned bits) {
        const __m256i from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(kPacked.lanes[bits])));
        store(p, _mm256_permutevar8x32_ps(x, from));
        return __builtin_popcount(bits);
    }

    typedef uint32_t U __attribute__((vector_size(32)));
    static U load(const uint32_t* p) { return (U)_mm256_loadu_si256((const __m256i*)p); }
    static void multiply(U x, uint32_t factor, U& high, U& low) {
        const __m256i all = _mm256_set1_epi64x(factor), even = _mm256_mul_epu32((__m256i)x, all),
                      odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), all);
        high = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
        low = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    }
    // both halves are exact, so the sum is rounded once
    static F real(U x) {
        const __m256i high = _mm256_srli_epi32((__m256i)x, 16), low = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(0xffff));
        return fma(_mm256_cvtepi32_ps(high), set(0x1p16f), _mm256_cvtepi32_ps(low));
    }
    // In each 128 bits, word j of vector i to word i of vector j.
    static void transpose(F (&x)[4]) {
        const F a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]), c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
        x[0] = low_pairs(a, c), x[1] = high_pairs(a, c), x[2] = low_pairs(b, d), x[3] = high_pairs(b, d);
    }

private:
    // Of every set of lanes, which they are: a byte each, the lowest first.
    struct Packed {
        uint64_t lanes[256] = {};
        constexpr Packed() {
            for (int bits = 0; bits < 256; ++bits)
                for (int lane = 0, place = 0; lane < 8; ++lane)
                    if (bits >> lane & 1) lanes[bits] |= uint64_t(lane) << 8 * place++;
        }
    };
    static const Packed kPacked;
    static F low_pairs(F a, F b) { return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); }
    static F high_pairs(F a, F b) { return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); }
    static __m128i to_f16(F x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static __m128i to_bf16(F x) {
        const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }
};

inline constexpr Float::Packed Float::kPacked;

inline void end_of_streams() { _mm_sfence(); }
