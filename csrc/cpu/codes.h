// One uniform grid per group of consecutive elements: packed unsigned codes of keys and values, their decoding, and the
// round trip in one step (fake quantization). The numbers of qexp/kernels/quantize.py, bit for bit.
#pragma once

#include <cstdint>

#include "hadamard.h"
#include "parallel.h"

namespace qexp {

// Codes 0 .. 2^bits - 1 stand for scale * (code - zero).
struct GridRule {
    int bits;
    bool symmetric;  // scale from max|x|, zero = 2^(bits - 1)
    bool widen;      // asymmetric only: a range that does not contain 0 is widened to it
    float clip;      // fraction of the range
    bool half = false;  // scale and zero are to be kept in float16: the scale is rounded to it before any code is derived
};

struct QuantizeTask {
    const void* x;
    int64_t row_stride, rows, n;
    Dtype dtype;
    GridRule rule;   // bits 2, 4 or 8
    int64_t group;   // divides n
    uint8_t* packed;  // [rows][n bits / 8]
    float *scale, *zero;  // [rows][n / group]
};

struct DequantizeTask {
    const uint8_t* packed;
    const float *scale, *zero;
    int64_t rows, n;
    int bits;
    int64_t group;
    Dtype dtype;
    void* y;  // [rows][n]
};

struct FakeQuantizeTask {
    const void* x;
    int64_t row_stride, rows, n;
    Dtype dtype;
    GridRule rule;  // bits 2 .. 8
    int64_t group;
    void* y;  // [rows][n], dtype of x
};

void quantize_codes(const QuantizeTask& task, ParallelFor loop);
void dequantize_codes(const DequantizeTask& task, ParallelFor loop);
void fake_quantize(const FakeQuantizeTask& task, ParallelFor loop);

struct CodesKernels {
    void (*quantize)(const QuantizeTask& task, int64_t begin, int64_t end);
    void (*dequantize)(const DequantizeTask& task, int64_t begin, int64_t end);
    void (*fake_quantize)(const FakeQuantizeTask& task, int64_t begin, int64_t end);
};

// Each vector tier hands what its vectors do not divide to the next narrower one.
extern const CodesKernels codes_scalar, codes_avx2, codes_avx512bw;

}  // namespace qexp
