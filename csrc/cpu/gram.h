// The second moment of activations: H += X^T X, sums in double, each pair of columns computed once.
//
// X comes row by row (a token each), which is how an outer product wants it: per token, 16 columns times 16 columns.
// Tokens are taken in chunks; a chunk's columns are copied into panels of 16 so that a tile reads two short arrays.
// A chunk is summed in float32 registers and chunks in H, which keeps rounding far below that of one long sum.
//
// A panel is [steps][16] words of four bytes: a float32, or two bfloat16 of neighbouring tokens where the machine
// multiplies those in pairs (exact products, sums in float32, twice the tokens a step; subnormals count as zero).
#pragma once

#include <cstdint>

#include "parallel.h"

namespace qexp {

constexpr int64_t kGramTile = 16;    // columns of a panel, rows and columns of a tile
constexpr int64_t kGramSteps = 512;  // of a chunk: a panel takes 32 KB, and H is not passed over too often

// tile[16][16] += sum over steps of a[s][:] outer b[s][:]; a and b are panels.
using GramTile = void (*)(const float* a, const float* b, int64_t steps, float* tile);

void gram_tile_scalar(const float* a, const float* b, int64_t steps, float* tile);
void gram_tile_avx2(const float* a, const float* b, int64_t steps, float* tile);
void gram_tile_avx512bw(const float* a, const float* b, int64_t steps, float* tile);
void gram_tile_avx512bf16(const float* a, const float* b, int64_t steps, float* tile);  // words are pairs

enum class GramInput { fp32, bf16 };

// Adds X^T X to sum [columns][columns], on and above its diagonal, for x [tokens][columns].
void add_gram(const void* x, GramInput kind, int64_t tokens, int64_t columns, double* sum, ParallelFor loop);

}  // namespace qexp
