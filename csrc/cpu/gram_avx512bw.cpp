// gram.h with AVX-512: a whole tile in sixteen registers, one load and sixteen broadcasting FMAs per step.
#include <immintrin.h>

#include "gram.h"

namespace qexp {

void gram_tile_avx512bw(const float* a, const float* b, int64_t steps, float* tile) {
    __m512 sum[kGramTile];
    for (auto& row : sum) row = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s) {
        const __m512 columns = _mm512_loadu_ps(b + s * kGramTile);
#pragma GCC unroll 16
        for (int r = 0; r < kGramTile; ++r) {
            sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[s * kGramTile + r]), columns, sum[r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kGramTile; ++r) {
        float* out = tile + r * kGramTile;
        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum[r]));
    }
}

}  // namespace qexp
