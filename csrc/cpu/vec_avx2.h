// Eight floats: the vectors of the AVX2 tiers (AVX2, FMA, F16C). The pairs of vec_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

struct Vec256 {
    using F = __m256;
    using I = __m256i;
    static constexpr int lanes = 8;
    static constexpr int max_pairs = 4;
    static constexpr int radix_bits = 3;

    struct Pair {
        F even, odd;
    };

    static F load(const float* p) { return _mm256_load_ps(p); }
    static void store(float* p, F v) { _mm256_store_ps(p, v); }
    static F set(float v) { return _mm256_set1_ps(v); }
    static F zero() { return _mm256_setzero_ps(); }
    static I izero() { return _mm256_setzero_si256(); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }  // b where either is NaN
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F negate(F v) { return _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)); }
    static I bits(F v) { return _mm256_castps_si256(v); }
    static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
    static I to_int(F v) { return _mm256_cvtps_epi32(v); }  // half to even
    static F to_float(I v) { return _mm256_cvtepi32_ps(v); }

    static int32_t reduce_add(I v) {
        alignas(32) int32_t lane[lanes];
        _mm256_store_si256(reinterpret_cast<I*>(lane), v);
        return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
    static I magnitude(F v) { return _mm256_and_si256(bits(v), _mm256_set1_epi32(INT32_MAX)); }
    static I umax(I a, I b) { return _mm256_max_epu32(a, b); }
    static uint32_t reduce_umax(I v) {
        __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
        m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
    }
    static float reduce_min(F v) {
        __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        m = _mm_min_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_min_ss(m, _mm_shuffle_ps(m, m, 1)));
    }
    static float reduce_max(F v) {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
    }

    // (a + b) in the lower, (a - b) in the upper lane of every two lanes that lie Distance apart.
    template <int Distance>
    static F butterfly(F v) {
        if constexpr (Distance == 1) {
            return _mm256_fmadd_ps(v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(v, 0xB1));
        } else if constexpr (Distance == 2) {
            return _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(v, 0x4E));
        } else {
            return _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(v, v, 0x01));
        }
    }

    static Pair load_pair(const Bf16* p) {
        const I w = _mm256_loadu_si256(reinterpret_cast<const I*>(p));
        const I high = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_and_si256(w, high))};
    }
    static Pair load_pair(const Fp16* p) {
        const I w = _mm256_loadu_si256(reinterpret_cast<const I*>(p));
        const I even = _mm256_and_si256(w, _mm256_set1_epi32(0xFFFF)), odd = _mm256_srli_epi32(w, 16);
        const I parted = _mm256_permute4x64_epi64(_mm256_packus_epi32(even, odd), 0xD8);
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(parted)), _mm256_cvtph_ps(_mm256_extracti128_si256(parted, 1))};
    }
    static Pair load_pair(const float* p) {
        const F a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
        return {in_order(_mm256_shuffle_ps(a, b, 0x88)), in_order(_mm256_shuffle_ps(a, b, 0xDD))};
    }

    static void store_pair(Bf16* p, Pair v) {
        const I even = _mm256_srli_epi32(to_bf16(v.even), 16);
        _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_blend_epi16(even, to_bf16(v.odd), 0xAA));
    }
    static void store_pair(Fp16* p, Pair v) {
        const I even = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v.even, _MM_FROUND_TO_NEAREST_INT));
        const I odd = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v.odd, _MM_FROUND_TO_NEAREST_INT));
        _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_or_si256(even, _mm256_slli_epi32(odd, 16)));
    }
    static void store_pair(float* p, Pair v) {
        const F low = _mm256_unpacklo_ps(v.even, v.odd), high = _mm256_unpackhi_ps(v.even, v.odd);
        _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
        _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }

    // Codes: 2 * lanes values of Bits bits, the low bits of each lane, to Bits * lanes / 4 bytes.
    template <int Bits>
    static void store_codes(uint8_t* p, I even, I odd) {
        const I mask = _mm256_set1_epi32((1 << Bits) - 1);
        const I both = _mm256_or_si256(_mm256_and_si256(even, mask),
                                       _mm256_slli_epi32(_mm256_and_si256(odd, mask), Bits));
        if constexpr (Bits == 8) {
            const I words = _mm256_permute4x64_epi64(_mm256_packus_epi32(both, both), 0xD8);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
        } else if constexpr (Bits == 4) {
            const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
        } else {  // two lanes to a byte
            const I joined = _mm256_or_si256(both, _mm256_srli_epi64(both, 32 - 2 * Bits));
            const I bytes = _mm256_shuffle_epi8(joined, _mm256_set1_epi64x(0x0800));
            _mm_storeu_si32(p, _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
        }
    }
    // The reverse, as unsigned integers.
    template <int Bits>
    static void load_codes(const uint8_t* p, I& even, I& odd) {
        I both;
        if constexpr (Bits == 8) {
            both = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        } else if constexpr (Bits == 4) {
            both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        } else {
            const I wide = _mm256_cvtepu8_epi64(_mm_loadu_si32(p));
            both = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi64(wide, 32 - 2 * Bits)),
                                    _mm256_set1_epi32((1 << (2 * Bits)) - 1));
        }
        even = _mm256_and_si256(both, _mm256_set1_epi32((1 << Bits) - 1));
        odd = _mm256_srli_epi32(both, Bits);
    }

private:
    static F in_order(F v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xD8)); }
    // bf16, rounded half to even, in the upper half of each lane; the lower half is noise.
    static I to_bf16(F v) {
        const I w = bits(v);
        const I last = _mm256_and_si256(_mm256_srli_epi32(w, 16), _mm256_set1_epi32(1));
        const F rounded = _mm256_castsi256_ps(_mm256_add_epi32(w, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF))));
        const F nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
        return bits(_mm256_blendv_ps(rounded, nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    }
};

}  // namespace
