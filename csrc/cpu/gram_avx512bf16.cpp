// gram.h with AVX-512-BF16: as gram_avx512bw.cpp, but each word holds two tokens and one instruction multiplies both.
#include <immintrin.h>

#include "gram.h"

namespace qexp {

void gram_tile_avx512bf16(const float* a, const float* b, int64_t steps, float* tile) {
    __m512 sum[kGramTile];
    for (auto& row : sum) row = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s) {
        const __m512 columns = _mm512_loadu_ps(b + s * kGramTile);
#pragma GCC unroll 16
        for (int r = 0; r < kGramTile; ++r) {
            const __m512 value = _mm512_set1_ps(a[s * kGramTile + r]);
            sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)columns, (__m512bh)value);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kGramTile; ++r) {
        float* out = tile + r * kGramTile;
        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum[r]));
    }
}

}  // namespace qexp
