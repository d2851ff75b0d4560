// Sixteen floats: the vectors of the AVX-512 tiers. F, BW, VL and DQ suffice.
//
// Neighbouring elements travel as a pair of vectors (even, odd): two bf16 of one 32-bit word come apart without a
// shuffle, the first butterfly needs none, and two codes of one byte (or byte pair) are joined by a shift.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// gcc's own AVX-512 header passes undefined vectors on purpose and then warns about them (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstdint>

namespace {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

struct Vec512 {
    using F = __m512;
    using I = __m512i;
    static constexpr int lanes = 16;
    static constexpr int max_pairs = 8;   // of one pass in registers: 16 of the 32
    static constexpr int radix_bits = 4;  // of a strided pass

    struct Pair {
        F even, odd;
    };

    static F load(const float* p) { return _mm512_load_ps(p); }
    static void store(float* p, F v) { _mm512_store_ps(p, v); }
    static F set(float v) { return _mm512_set1_ps(v); }
    static F zero() { return _mm512_setzero_ps(); }
    static I izero() { return _mm512_setzero_si512(); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    // Zen adds and multiplies on separate units: the adders alone would bound a butterfly. Exact: one rounding either way.
    static F sub(F a, F b) { return _mm512_fnmadd_ps(b, _mm512_set1_ps(1.0f), a); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }  // b where either is NaN
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F negate(F v) { return _mm512_castsi512_ps(_mm512_xor_si512(bits(v), _mm512_set1_epi32(INT32_MIN))); }
    static I bits(F v) { return _mm512_castps_si512(v); }
    static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    static I to_int(F v) { return _mm512_cvtps_epi32(v); }  // half to even
    static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static int32_t reduce_add(I v) { return _mm512_reduce_add_epi32(v); }

    static I magnitude(F v) { return _mm512_and_si512(bits(v), _mm512_set1_epi32(INT32_MAX)); }
    static I umax(I a, I b) { return _mm512_max_epu32(a, b); }
    static uint32_t reduce_umax(I v) { return _mm512_reduce_max_epu32(v); }
    static float reduce_min(F v) { return _mm512_reduce_min_ps(v); }
    static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }

    // (a + b) in the lower, (a - b) in the upper lane of every two lanes that lie Distance apart.
    template <int Distance>
    static F butterfly(F v) {
        if constexpr (Distance == 1) {
            return sign_add<0xAAAA>(_mm512_permute_ps(v, 0xB1), v);
        } else if constexpr (Distance == 2) {
            return sign_add<0xCCCC>(_mm512_permute_ps(v, 0x4E), v);
        } else if constexpr (Distance == 4) {
            return sign_add<0xF0F0>(_mm512_shuffle_f32x4(v, v, 0xB1), v);
        } else {
            return sign_add<0xFF00>(_mm512_shuffle_f32x4(v, v, 0x4E), v);
        }
    }

    static Pair load_pair(const Bf16* p) {
        const I w = _mm512_loadu_si512(p);
        const I high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_and_si512(w, high))};
    }
    static Pair load_pair(const Fp16* p) {
        const I w = _mm512_loadu_si512(p);
        return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(w)),
                _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)))};
    }
    static Pair load_pair(const float* p) {
        const F a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
        return {_mm512_permutex2var_ps(a, evens(), b), _mm512_permutex2var_ps(a, odds(), b)};
    }

    static void store_pair(Bf16* p, Pair v) {
        const I even = _mm512_srli_epi32(to_bf16(v.even), 16);
        const I high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
        _mm512_storeu_si512(p, _mm512_or_si512(even, _mm512_and_si512(to_bf16(v.odd), high)));
    }
    static void store_pair(Fp16* p, Pair v) {
        const I even = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v.even, _MM_FROUND_TO_NEAREST_INT));
        const I odd = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v.odd, _MM_FROUND_TO_NEAREST_INT));
        _mm512_storeu_si512(p, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
    static void store_pair(float* p, Pair v) {
        const I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const I high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        _mm512_storeu_ps(p, _mm512_permutex2var_ps(v.even, low, v.odd));
        _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(v.even, high, v.odd));
    }

    // Codes: 2 * lanes values of Bits bits, the low bits of each lane, to Bits * lanes / 4 bytes.
    template <int Bits>
    static void store_codes(uint8_t* p, I even, I odd) {
        const I mask = _mm512_set1_epi32((1 << Bits) - 1);
        // 0xEA: (even & mask) | shifted
        const I both = _mm512_ternarylogic_epi32(even, mask, _mm512_slli_epi32(odd, Bits), 0xEA);
        if constexpr (Bits == 8) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(both));
        } else if constexpr (Bits == 4) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(both));
        } else {  // two lanes to a byte: only the low 2 Bits bits of a lane may count
            const I clean = _mm512_and_si512(both, _mm512_set1_epi32((1 << (2 * Bits)) - 1));
            const I joined = _mm512_or_si512(clean, _mm512_srli_epi64(clean, 32 - 2 * Bits));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(joined));
        }
    }
    // The reverse, as unsigned integers.
    template <int Bits>
    static void load_codes(const uint8_t* p, I& even, I& odd) {
        I both;
        if constexpr (Bits == 8) {
            both = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        } else if constexpr (Bits == 4) {
            both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        } else {
            const I wide = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
            both = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi64(wide, 32 - 2 * Bits)),
                                    _mm512_set1_epi32((1 << (2 * Bits)) - 1));
        }
        even = _mm512_and_si512(both, _mm512_set1_epi32((1 << Bits) - 1));
        odd = _mm512_srli_epi32(both, Bits);
    }

private:
    // permuted + v, but permuted - v where Negative has a bit: one FMA by +-1, exact.
    template <int Negative>
    static F sign_add(F permuted, F v) {
        const F sign = _mm512_mask_blend_ps(Negative, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
        return _mm512_fmadd_ps(v, sign, permuted);
    }
    static I evens() { return _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
    static I odds() { return _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
    // bf16, rounded half to even, in the upper half of each lane; the lower half is noise.
    static I to_bf16(F v) {
        const I w = bits(v);
        const I last = _mm512_and_si512(_mm512_srli_epi32(w, 16), _mm512_set1_epi32(1));
        const I rounded = _mm512_add_epi32(w, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF)));
        return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7FC00000));
    }
};

}  // namespace
