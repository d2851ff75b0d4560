// Neighbouring columns of a weight rounded one after the other to a uniform grid, each error fed to the next ones.
//
// This is the innermost part of GPTQ's sweep. Rows of the weight do not interact, so the columns are stored as
// contiguous rows [columns][rows] and a task takes a range of rows through all columns while they lie in its cache.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace qexp {

struct Sweep {
    float* target;         // [columns][stride], changed: column k gathers the errors of the columns before it
    float* error;          // [columns][stride]: the original weight, afterwards weight - rounded
    const float* mix;      // [columns][mix_stride]: mix[j][k], j < k, is the share of column j's error that k takes
    const float* scale;    // [columns][rows]
    const float* zero;     // [columns][rows], whole numbers in 0..top
    uint8_t* codes;        // [columns][rows]
    int64_t columns, rows, stride, mix_stride;
    float top;             // the greatest code
};

void sweep_scalar(const Sweep& sweep, int64_t begin, int64_t end);
void sweep_avx2(const Sweep& sweep, int64_t begin, int64_t end);
void sweep_avx512bw(const Sweep& sweep, int64_t begin, int64_t end);

void sweep_columns(const Sweep& sweep, ParallelFor loop);

}  // namespace qexp
