// Hadamard rotation of rows, alone or fused with quantization, packing and sums of codes.
//
// y = x (H_K' (x) S_{2^power})^T on every block of K' 2^power columns. All tiers add in one order (butterflies of
// stride 1, 2, 4, .., then H_K' as Rotation says), so that every instruction set returns the same bits; so does the
// reference in qexp/kernels/had_quant.py.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"

namespace qexp {

enum class Dtype : int { fp32, bf16, fp16 };

// What acts on each block of order << power columns; order 1 and power 0 leave x alone.
//
// H_K' is read four columns at a time. In such a group a row of H is a sign times one of the eight patterns that begin
// with +, so eight sums of four inputs, made once, serve every row. A row adds those with sign +, then subtracts those
// with sign -, chunk by chunk of kChunk groups.
struct Rotation {
    static constexpr int64_t kChunk = 16;

    int64_t order = 1;  // K'
    int power = 0;
    const uint8_t* picks = nullptr;      // [order][groups]: 8 (group in chunk) + pattern, those to add first
    const uint8_t* positives = nullptr;  // [order][chunks]: how many are added

    int64_t width() const { return order << power; }
    int64_t groups() const { return (order + 3) / 4; }
    int64_t chunks() const { return (groups() + kChunk - 1) / kChunk; }
};

// What Rotation points to.
struct Picks {
    std::vector<uint8_t> picks, positives;
};

// Reads H_K' [order, order]; empty if an entry is not +-1. Columns past the last count as +.
Picks picks_of(const int8_t* had_k, int64_t order);

struct HadamardTask {
    const void* x;
    void* y;             // contiguous, dtype of x
    int64_t row_stride;  // elements between rows of x; the elements of a row are adjacent
    int64_t rows, n;
    Dtype dtype;
    Rotation rotation;
    float scale;
};

struct HadQuantTask {
    const void* x;
    int64_t row_stride;
    int64_t rows, n;
    Dtype dtype;
    Rotation rotation;
    float norm;     // of the rotation; folded into the quantizer
    float clip;
    int bits;       // 4 or 8
    bool packed;    // two nibbles to a byte, else one code to a byte
    int64_t group;  // columns that share a scale, divides n
    int64_t sum_group;
    uint8_t* q;
    float* scale;   // [rows][n / group]
    int32_t* sums;  // [rows][n / sum_group]
};

void hadamard(const HadamardTask& task, ParallelFor loop);
void had_quant(const HadQuantTask& task, ParallelFor loop);

// A worker serves rows [begin, end). Its work space has work_floats(n) floats and is aligned to 64 bytes.
int64_t work_floats(int64_t n);

struct HadamardKernels {
    void (*hadamard)(const HadamardTask& task, int64_t begin, int64_t end, float* work);
    void (*had_quant)(const HadQuantTask& task, int64_t begin, int64_t end, float* work);
};

// The tiers; each hands what its vectors do not divide to the next narrower one.
extern const HadamardKernels hadamard_scalar, hadamard_avx2, hadamard_avx512bw;

}  // namespace qexp
