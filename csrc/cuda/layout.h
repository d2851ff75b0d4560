// Where things lie: the one weight layout of all CUDA kernels, and the lane maps of the tensor-core instructions.
//
// Everything here is constexpr and needs no CUDA header, so that the host tests can prove the maps to be bijections.
//
// Weight layout "w4_tile": [rows / 16][columns / 64] tiles of 512 bytes, 16 bytes per lane of a warp. Lane 4 g + t
// holds rows g and g + 8 of its tile; byte b = 4 word + i of its 16 bytes is row g + 8 (word & 1), columns
//     32 (word >> 1) + 4 t + i       in the low nibble,
//     32 (word >> 1) + 16 + 4 t + i  in the high one.
// So `word << 4` and `word`, masked with 0xF0F0F0F0, ARE the four s8 operand registers of a 16 x 32 step of mma.sync
// and of a warp's quarter of wgmma (times 16), with no byte moved; and a warp's load is 512 consecutive bytes. Source:
// PTX ISA, matrix fragments of mma.m16n8k32 and wgmma.m64nNk32.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define QEXP_BOTH __host__ __device__
#else
#define QEXP_BOTH
#endif

namespace qexp::cuda {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;
constexpr int kTileBytes = kTileRows * kTileColumns / 2;
constexpr int kRowPadding = 128;  // features are padded to the tallest block tile, so that no kernel reads past the end

struct Cell {
    int row, column;
};

struct Nibble {
    int lane, byte, high;
};

// The weight in one nibble of a tile.
QEXP_BOTH constexpr Cell cell_of(Nibble at) {
    const int word = at.byte / 4, i = at.byte % 4;
    return {at.lane / 4 + 8 * (word & 1), 32 * (word >> 1) + 16 * at.high + 4 * (at.lane & 3) + i};
}

// The nibble that holds a weight of a tile; the inverse of cell_of.
QEXP_BOTH constexpr Nibble nibble_of(Cell cell) {
    const int word = 2 * (cell.column / 32) + cell.row / 8;
    return {4 * (cell.row % 8) + cell.column % 16 / 4, 4 * word + cell.column % 4, cell.column / 16 % 2};
}

// Native s4 operands hold 8 nibbles a register. Activations are reordered, within 64 columns, to the column that the
// weight nibble at the same place has: position 8 (2 t + p) + 2 i + h of a row of 64.
QEXP_BOTH constexpr int s4_column(int position) {
    const int t = position / 16, p = position / 8 % 2, i = position % 8 / 2, h = position % 2;
    return 32 * p + 16 * h + 4 * t + i;
}

// ---- operand registers: (lane, register, element of the register) -> cell ------------------------------------------
// `bits` is the width of an element: 4, 8 or 16. A is [16 x K], B is [K x 8] given as {K, column}, C is [16 x 8].

QEXP_BOTH constexpr Cell a_cell(int bits, int lane, int reg, int element) {
    const int each = 32 / bits;
    return {lane / 4 + 8 * (reg & 1), (reg >> 1) * 4 * each + (lane & 3) * each + element};
}

QEXP_BOTH constexpr Cell b_cell(int bits, int lane, int reg, int element) {
    const int each = 32 / bits;
    return {reg * 4 * each + (lane & 3) * each + element, lane / 4};
}

QEXP_BOTH constexpr Cell c_cell(int lane, int reg) { return {lane / 4 + 8 * (reg >> 1), 2 * (lane & 3) + (reg & 1)}; }

// ---- shared memory: 16-byte chunks, permuted so that the eight rows of a ldmatrix fall into different banks
// ----------

// Rows of 64 bytes: two rows make a line of 128 bytes.
QEXP_BOTH constexpr int chunk_in_64(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) * 16); }

// Rows of 128 bytes: also what TMA's 128-byte swizzle writes and wgmma reads, for 1024-byte aligned tiles.
QEXP_BOTH constexpr int chunk_in_128(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) * 16); }

// A row of floats that is read along any power-of-two stride: bits 2..4 of the index choose a bank quad and take over
// the bits that change between lanes (5, 6 when a lane writes 16 or 32 in a row, 8 and up when it reads columns).
QEXP_BOTH constexpr int scattered(int i) { return i ^ ((i >> 5 & 7) << 2) ^ ((i >> 8 & 1) << 4); }

}  // namespace qexp::cuda
