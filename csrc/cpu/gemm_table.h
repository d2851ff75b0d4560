// What one instruction set offers to the driver in gemm.cpp. One table per tier, filled from gemm_tiles.h.
//
// A tile is `rows` rows of activations times `blocks` blocks of 16 columns. Activations are packed [k / 8][rows][8] for
// each block of rows; weights are read straight from p16k8 ("direct", few rows) or from a panel of bytes unpacked once
// for many rows ("panel": [k / 8][low, high][16 blocks columns][4]).
#pragma once

#include <cstdint>

#include "gemm.h"

namespace qexp {

constexpr int kMaxRows = 8;    // of a block of rows
constexpr int kMaxBlocks = 4;  // of a tile

// A stretch of K: `groups` groups, or one piece of a group; then `first` and `last` tell whether the group begins and
// ends here, and the integers travel in `carry` between its pieces.
struct TileTask {
    const int8_t* a;
    const uint8_t* w;
    int64_t block_stride;  // bytes between column blocks of w; unused for panels
    const float* scale;    // [groups][16] of the first block
    const float* shift;    // or nullptr
    int64_t scale_stride;  // floats between column blocks
    const int32_t* sums;   // [groups][rows]
    int64_t steps;         // of 8 k, in a group (or the piece)
    int64_t groups;
    bool first, last;
    float* total;    // [rows][leading]
    int32_t* carry;  // [rows][leading]; read unless first, written unless last
    int64_t leading;
};

// The same with float activations. x is packed for each block of rows: fp32 [k][rows], or pairs of bf16
// [pair][rows][2], the pairs in the order kPairs, four to a step.
struct FloatTileTask {
    const void* x;
    const uint8_t* w;
    int64_t block_stride;
    const float* scale;
    const float* shift;
    int64_t scale_stride;
    const float* sums;  // [groups][rows]; read only with shift
    int64_t steps, groups;
    float* total;  // [rows][leading], added to
    int64_t leading;
};

// A lane of p16k8 has 32 bits: its halves hold the nibbles of these k of a step when shifted right by 0, 4, 8 and 12.
constexpr int kPairs[4][2] = {{0, 2}, {4, 6}, {1, 3}, {5, 7}};

struct PackTask {
    const uint8_t* a;  // first row of the block of rows
    bool nibbles;
    int64_t row_bytes;
    int rows;
    int64_t k, group;     // group = k for one group
    const int32_t* given; // sums of the first row, or nullptr
    int8_t* packed;       // [k / 8][rows][8], zeros past k
    int32_t* sums;        // [groups][rows]
};

struct FinishTask {
    const float* total;  // [rows][leading]
    int64_t leading;
    int64_t rows, columns;  // columns is what is left of n
    const float* a_scale;   // [rows], nullptr for 1
    const float* bias;      // from the first column, or nullptr
    void* out;              // first element
    int64_t out_stride;     // elements
    Float dtype;
};

struct FloatKernels {
    int rows, blocks_few, blocks_many;  // as for "direct" below
    void (*direct)(const FloatTileTask&, int rows, int blocks);
};

struct GemmTable {
    int direct_rows, direct_blocks_few, direct_blocks_many;  // blocks for up to 4 rows, and for more
    int panel_rows, panel_blocks;
    void (*pack)(const PackTask&);
    void (*direct)(const TileTask&, int rows, int blocks);
    void (*unpack)(const uint8_t* w, int64_t block_stride, int64_t steps, int blocks, uint8_t* panel);
    void (*panel)(const TileTask&, int rows, int blocks);
    void (*finish)(const FinishTask&);
    FloatKernels fp32;
};

extern const GemmTable gemm_scalar;
#if defined(__x86_64__)
extern const GemmTable gemm_avx2, gemm_avxvnni, gemm_avx512bw, gemm_avx512vnni;
extern const FloatKernels gemm_avx512bf16;  // x in bf16
#endif

}  // namespace qexp
