// Products of activations [m][k] with weights [n][k] in the layout p16k8.
//
// out[m][n] = a_scale[m] * sum_g (w_scale[n][g] acc[m][n][g] - w_shift[n][g] sum_k a[m][k]) + bias[n]
// acc is the exact integer sum over the group; the rest is fp32 with one fma a group, in order of g, and one rounding
// to the output. So a row's result depends neither on the other rows nor on the tier or the number of threads.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace qexp {

enum class Float : int { fp32, bf16, fp16 };

constexpr int64_t kLargestK = (int64_t{1} << 21) - 1;  // |sum| <= 2^10 k stays in int32

struct W4Weight {
    const uint8_t* blocks;  // p16k8 after the header
    const float* scale;     // [n / 16 rounded up][groups][16]
    const float* shift;     // the same shape, scale * zero point; nullptr without zero points
    int64_t n, k;
    int64_t group;  // multiple of 8 that divides k, or 0: one group, k may then be any even number
};

struct W4Output {
    const float* bias;  // [n] or nullptr
    void* data;         // [m][n], contiguous
    Float dtype;
};

struct W4A8Call {
    const void* a;         // int8 rows of k, or canonical nibbles, k / 2 bytes a row
    bool nibbles;
    int64_t row_bytes;     // distance of rows
    int64_t m;
    const float* a_scale;  // [m]
    const int32_t* sums;   // [m][groups] of a, or nullptr to have them computed
    W4Weight weight;
    W4Output out;
};

struct W4A16Call {
    const void* x;
    Float dtype;         // of x
    int64_t row_stride;  // elements
    int64_t m;
    W4Weight weight;
    W4Output out;
};

void w4a8(const W4A8Call& call, ParallelFor loop);
void w4a16(const W4A16Call& call, ParallelFor loop);

// The integers alone, summed over all of k: out int32 [m][n]. Scales are not read.
void w4a8_i32(const int8_t* a, int64_t row_bytes, int64_t m, const W4Weight& weight, int32_t* out, ParallelFor loop);

}  // namespace qexp
