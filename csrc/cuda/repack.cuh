// Offline and in front of a product: nibbles from the canonical order to the one that a kernel reads, and back.
#pragma once

#include "numbers.cuh"

namespace qexp::cuda {

struct Repack {
    const uint8_t* from;
    uint8_t* to;
    int32_t rows, columns;  // of the matrix, in elements
    int64_t jobs;           // one per thread
};

QEXP_DEVICE uint32_t canonical_nibble(const Repack& p, int row, int column) {
    if (row >= p.rows || column >= p.columns) return 0;
    const int64_t byte = (static_cast<int64_t>(row) * p.columns + column) / 2;
    return p.from[byte] >> (4 * (column & 1)) & 15u;
}

struct RepackKernel {
    using Args = Repack;
    static constexpr int threads = 256, blocks_per_sm = 1;
    static QEXP_DEVICE int64_t job() { return static_cast<int64_t>(simt::block_x()) * threads + simt::thread(); }
};

// A thread writes the 16 bytes of one lane of one tile.
struct Prepack : RepackKernel {
    static QEXP_DEVICE void run(const Args& p, void*) {
        if (job() >= p.jobs) return;
        const int64_t tile = job() / 32;
        const int lane = static_cast<int>(job() % 32), across = (p.columns + kTileColumns - 1) / kTileColumns;
        const int row = static_cast<int>(tile / across) * kTileRows,
                  column = static_cast<int>(tile % across) * kTileColumns;
        for (int byte = 0; byte < 16; ++byte) {
            const Cell low = cell_of({lane, byte, 0}), high = cell_of({lane, byte, 1});
            const uint32_t value = canonical_nibble(p, row + low.row, column + low.column) |
                                   canonical_nibble(p, row + high.row, column + high.column) << 4;
            p.to[job() * 16 + byte] = static_cast<uint8_t>(value);
        }
    }
};

// A thread writes one canonical byte.
struct Unprepack : RepackKernel {
    static QEXP_DEVICE uint32_t nibble(const Repack& p, int row, int column) {
        const int across = (p.columns + kTileColumns - 1) / kTileColumns;
        const int64_t tile = static_cast<int64_t>(row / kTileRows) * across + column / kTileColumns;
        const Nibble at = nibble_of({row % kTileRows, column % kTileColumns});
        return p.from[tile * kTileBytes + at.lane * 16 + at.byte] >> (4 * at.high) & 15u;
    }
    static QEXP_DEVICE void run(const Args& p, void*) {
        if (job() >= p.jobs) return;
        const int half = p.columns / 2, row = static_cast<int>(job() / half),
                  column = static_cast<int>(job() % half) * 2;
        p.to[job()] = static_cast<uint8_t>(nibble(p, row, column) | nibble(p, row, column + 1) << 4);
    }
};

// A thread turns 8 nibbles into 8 bytes; rows are padded with zeros to a multiple of 64 elements.
struct Expand : RepackKernel {
    static QEXP_DEVICE void run(const Args& p, void*) {
        if (job() >= p.jobs) return;
        const int pieces = (p.columns + 63) / 64 * 8, row = static_cast<int>(job() / pieces);
        const int column = static_cast<int>(job() % pieces) * 8;
        simt::Words2 out = {};
        for (int i = 0; i < 8; ++i) {
            const uint32_t q = (canonical_nibble(p, row, column + i) ^ 8u) - 8u;
            out.word[i / 4] |= (q & 0xFFu) << (8 * (i % 4));
        }
        *reinterpret_cast<simt::Words2*>(p.to + job() * 8) = out;
    }
};

// A thread writes the 8 nibbles of one operand register.
struct Reorder : RepackKernel {
    static QEXP_DEVICE void run(const Args& p, void*) {
        if (job() >= p.jobs) return;
        const int pieces = (p.columns + 63) / 64 * 8, row = static_cast<int>(job() / pieces);
        const int piece = static_cast<int>(job() % pieces), column = piece / 8 * 64;
        uint32_t out = 0;
        for (int i = 0; i < 8; ++i) out |= canonical_nibble(p, row, column + s4_column(piece % 8 * 8 + i)) << (4 * i);
        *reinterpret_cast<uint32_t*>(p.to + job() * 4) = out;
    }
};

struct Dequantize {
    const uint8_t* packed;
    const float* scale;  // [groups][padded rows]
    const float* inner;  // two-level groups, or null
    const float* zero;   // scale times zero point, or null
    void* out;           // [rows, columns] of out_type
    int32_t rows, columns, group, out_type;
    int64_t jobs;
};

// A thread turns the 16 bytes of one lane of one tile into 32 numbers scale * q - zero: for products of many tokens in
// 16 bits, where the weights are better decoded once.
struct DequantizeKernel {
    using Args = Dequantize;
    static constexpr int threads = 256, blocks_per_sm = 1;

    static QEXP_DEVICE void run(const Args& p, void*) {
        const int64_t job = static_cast<int64_t>(simt::block_x()) * threads + simt::thread();
        if (job >= p.jobs) return;
        const int64_t tile = job / 32;
        const int across = (p.columns + kTileColumns - 1) / kTileColumns, lane = static_cast<int>(job % 32);
        const int row0 = static_cast<int>(tile / across) * kTileRows,
                  column0 = static_cast<int>(tile % across) * kTileColumns;
        const simt::Words4 words = simt::load(reinterpret_cast<const simt::Words4*>(p.packed) + job);
        QEXP_UNROLL
        for (int byte = 0; byte < 16; byte += 4) {
            QEXP_UNROLL
            for (int high = 0; high < 2; ++high) {
                const Cell first = cell_of({lane, byte, high});  // four columns in a row follow one another
                write(p, words.word[byte / 4] >> (4 * high), row0 + first.row, column0 + first.column);
            }
        }
    }

    static QEXP_DEVICE void write(const Args& p, uint32_t word, int row, int column) {
        if (row >= p.rows) return;
        const int padded = (p.rows + kRowPadding - 1) / kRowPadding * kRowPadding;
        for (int i = 0; i < 4 && column + i < p.columns; ++i) {
            const int64_t group = p.group == 0 ? 0 : (column + i) / p.group, at = group * padded + row;
            float value = static_cast<float>(static_cast<int>((word >> (8 * i) & 15u) ^ 8u) - 8);
            value *= p.inner != nullptr ? p.inner[at] * p.scale[row] : p.scale[at];
            if (p.zero != nullptr) value -= p.zero[at];
            const int64_t index = static_cast<int64_t>(row) * p.columns + column + i;
            if (size_of(p.out_type) == 2)
                static_cast<uint16_t*>(p.out)[index] = static_cast<uint16_t>(encode(value, p.out_type));
            else
                static_cast<uint32_t*>(p.out)[index] = encode(value, p.out_type);
        }
    }
};

}  // namespace qexp::cuda
