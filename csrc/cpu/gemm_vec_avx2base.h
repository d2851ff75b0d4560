// Vectors of 8 int32 lanes, half a block of columns; the dot product is added by the tier.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qexp {
namespace {

struct Avx2 {
    static constexpr int kLanes = 8;
    using Bytes = __m256i;
    using Int = __m256i;
    using Real = __m256;
    using Element = float;  // of float activations

    static Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store_bytes(uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static Bytes low_nibbles(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static Bytes high_nibbles(Bytes v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
    static Bytes broadcast4(const int8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        return _mm256_set1_epi32(four);
    }
    static Int broadcast_int(int32_t v) { return _mm256_set1_epi32(v); }
    static Int load_ints(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store_ints(int32_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static Real to_real(Int v) { return _mm256_cvtepi32_ps(v); }
    static Real broadcast_real(float v) { return _mm256_set1_ps(v); }
    static Real load_reals(const float* p) { return _mm256_loadu_ps(p); }
    static void store_reals(float* p, Real v) { _mm256_storeu_ps(p, v); }
    static Real fma(Real a, Real b, Real c) { return _mm256_fmadd_ps(a, b, c); }
    static Real minus_product(Real a, Real b, Real c) { return _mm256_fnmadd_ps(a, b, c); }

    static Real nibble_value(Bytes v, int i) {
        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(v, 4 * i), _mm256_set1_epi32(15));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(8)));
    }

    static void store_bf16(uint16_t* p, Real v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(even, 16), _mm256_set1_epi32(0x7FC0), nan);
        const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }
    static void store_fp16(uint16_t* p, Real v) {
        const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
    }
};

}  // namespace
}  // namespace qexp
