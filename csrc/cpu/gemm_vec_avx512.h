// Vectors of 16 int32 lanes; the dot product is added by the tier.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qexp {
namespace {

struct Avx512 {
    static constexpr int kLanes = 16;
    using Bytes = __m512i;
    using Int = __m512i;
    using Real = __m512;
    using Element = float;  // of float activations

    static Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store_bytes(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
    static Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static Bytes high_nibbles(Bytes v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
    static Bytes broadcast4(const int8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
    static Int broadcast_int(int32_t v) { return _mm512_set1_epi32(v); }
    static Int load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void store_ints(int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
    static Real to_real(Int v) { return _mm512_cvtepi32_ps(v); }
    static Real broadcast_real(float v) { return _mm512_set1_ps(v); }
    static Real load_reals(const float* p) { return _mm512_loadu_ps(p); }
    static void store_reals(float* p, Real v) { _mm512_storeu_ps(p, v); }
    static Real fma(Real a, Real b, Real c) { return _mm512_fmadd_ps(a, b, c); }
    static Real minus_product(Real a, Real b, Real c) { return _mm512_fnmadd_ps(a, b, c); }

    // Nibble i of every lane as the weight it stands for; vpermps reads only the low four bits of an index.
    static Real nibble_value(Bytes v, int i) {
        const Real values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return _mm512_permutexvar_ps(_mm512_srli_epi32(v, static_cast<unsigned>(4 * i)), values);
    }

    static void store_bf16(uint16_t* p, Real v) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i half = _mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), nan, _mm512_set1_epi32(0x7FC0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(half));
    }
    static void store_fp16(uint16_t* p, Real v) {
        const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    }
};

}  // namespace
}  // namespace qexp
