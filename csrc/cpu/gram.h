// The second moment of activations: H = X^T X, in float32, computed once for each pair of columns.
//
// X comes row by row (a token each), which is how an outer product wants it: per token, 16 columns times 16 columns.
// Tokens are taken in chunks; a chunk's columns are copied into panels of 16 so that a tile reads two short arrays.
// Sums run over a chunk in registers and over chunks in H, which keeps rounding far below that of one long sum.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace qexp {

constexpr int64_t kGramTile = 16;    // columns of a panel, rows and columns of a tile
constexpr int64_t kGramChunk = 256;  // tokens at a time: a panel takes 16 KB, a third of a first-level cache

// tile[16][16] += sum over tokens of a[t][:] outer b[t][:]; a and b are panels [tokens][16].
using GramTile = void (*)(const float* a, const float* b, int64_t tokens, float* tile);

void gram_tile_scalar(const float* a, const float* b, int64_t tokens, float* tile);
void gram_tile_avx2(const float* a, const float* b, int64_t tokens, float* tile);
void gram_tile_avx512bw(const float* a, const float* b, int64_t tokens, float* tile);


enum class GramInput { fp32, bf16 };

// out [columns][columns] = X^T X for x [tokens][columns]; out is symmetric to the bit.
void gram(const void* x, GramInput kind, int64_t tokens, int64_t columns, float* out, ParallelFor loop);

}  // namespace qexp
