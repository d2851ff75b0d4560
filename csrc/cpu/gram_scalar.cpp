// gram.h without vector instructions: what every machine can run.
#include "gram.h"

namespace qexp {

void gram_tile_scalar(const float* a, const float* b, int64_t steps, float* tile) {
    for (int64_t row = 0; row < kGramTile; ++row) {
        float sum[kGramTile] = {};
        for (int64_t s = 0; s < steps; ++s) {
            for (int64_t c = 0; c < kGramTile; ++c) sum[c] += a[s * kGramTile + row] * b[s * kGramTile + c];
        }
        for (int64_t c = 0; c < kGramTile; ++c) tile[row * kGramTile + c] += sum[c];
    }
}

}  // namespace qexp
