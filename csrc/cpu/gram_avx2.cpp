// gram.h with AVX2 and FMA: four rows of a tile at a time, eight of the sixteen registers hold sums.
#include <immintrin.h>

#include "gram.h"

namespace qexp {

void gram_tile_avx2(const float* a, const float* b, int64_t steps, float* tile) {
    for (int64_t row = 0; row < kGramTile; row += 4) {
        __m256 sum[4][2];
        for (auto& pair : sum) pair[0] = pair[1] = _mm256_setzero_ps();
        for (int64_t s = 0; s < steps; ++s) {
            const __m256 low = _mm256_loadu_ps(b + s * kGramTile), high = _mm256_loadu_ps(b + s * kGramTile + 8);
            for (int r = 0; r < 4; ++r) {
                const __m256 value = _mm256_broadcast_ss(a + s * kGramTile + row + r);
                sum[r][0] = _mm256_fmadd_ps(value, low, sum[r][0]);
                sum[r][1] = _mm256_fmadd_ps(value, high, sum[r][1]);
            }
        }
        for (int r = 0; r < 4; ++r) {
            float* out = tile + (row + r) * kGramTile;
            _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sum[r][0]));
            _mm256_storeu_ps(out + 8, _mm256_add_ps(_mm256_loadu_ps(out + 8), sum[r][1]));
        }
    }
}

}  // namespace qexp
