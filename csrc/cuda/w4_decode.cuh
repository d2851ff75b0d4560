// Products for few tokens, where reading the weights is all the time there is: W4A8, W4A4 and W4A16.
//
// Features are the 16 rows of a tensor-core operand and tokens its 8 columns, so up to eight tokens waste nothing. A
// block owns 16 or 32 features; its eight warps take every eighth tile of 64 inputs, so that the block reads one
// contiguous stream, each lane keeping four 16-byte loads in flight. Partial sums meet in shared memory and are added
// in the order of the warps: the same bits every time.
#pragma once

#include <type_traits>

#include "epilogue.cuh"

namespace qexp::cuda {

enum class DecodeScales { channel, group, fine };  // fine: groups that are no multiple of 64 inputs

// Activations in int8: words of four, as ldmatrix would bring them.
struct OperandS8 {
    using Sum = int;
    struct Tile {
        uint32_t word[4];  // inputs 16 j + 4 t .. + 3
    };
    static constexpr float kUnit = kSixteenth;

    static QEXP_DEVICE void load(Tile& tile, const void* row, int k, int t, bool first, bool second) {
        const char* from = static_cast<const char*>(row) + k + 4 * t;
        for (int j = 0; j < 4; ++j) {
            const bool valid = j < 2 ? first : second;
            tile.word[j] = valid ? simt::load(reinterpret_cast<const uint32_t*>(from + 16 * j)) : 0u;
        }
    }
    // Half a tile: 32 inputs, from the lane's two words for them.
    template <int R, int C>
    static QEXP_DEVICE void multiply(const simt::Words4 (&weights)[R], const Tile (&x)[C], int half,
                                     int (&sum)[R][C][4]) {
        QEXP_UNROLL
        for (int i = 0; i < R; ++i) {
            const uint32_t low = weights[i].word[2 * half], high = weights[i].word[2 * half + 1];
            const uint32_t a[4] = {times16_low(low), times16_low(high), times16_high(low), times16_high(high)};
            QEXP_UNROLL
            for (int j = 0; j < C; ++j) simt::mma_s8(sum[i][j], a, x[j].word[2 * half], x[j].word[2 * half + 1]);
        }
    }
};

// Activations in bf16 or half; weights become numbers of that type, exactly.
template <int type>
struct Operand16 {
    using Sum = float;
    struct Tile {
        uint32_t word[8];  // step of 16 inputs: {inputs 4 t, 4 t + 2}, {4 t + 1, 4 t + 3}, the order of the nibbles
    };
    static constexpr float kUnit = 1.0f;

    static QEXP_DEVICE void load(Tile& tile, const void* row, int k, int t, bool first, bool second) {
        const char* from = static_cast<const char*>(row) + 2 * (k + 4 * t);
        for (int j = 0; j < 4; ++j) {
            const bool valid = j < 2 ? first : second;
            const simt::Words2 two =
                valid ? simt::load(reinterpret_cast<const simt::Words2*>(from + 32 * j)) : simt::Words2{};
            tile.word[2 * j] = simt::permute(two.word[0], two.word[1], 0x5410);
            tile.word[2 * j + 1] = simt::permute(two.word[0], two.word[1], 0x7632);
        }
    }
    static QEXP_DEVICE uint32_t decode(uint32_t word) { return type == QEXP_BF16 ? to_bf16x2(word) : to_half2(word); }
    static QEXP_DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        if constexpr (type == QEXP_BF16)
            simt::mma_bf16(sum, a, b0, b1);
        else
            simt::mma_half(sum, a, b0, b1);
    }
    template <int R, int C>
    static QEXP_DEVICE void multiply(const simt::Words4 (&weights)[R], const Tile (&x)[C], int half,
                                     float (&sum)[R][C][4]) {
        QEXP_UNROLL
        for (int high = 0; high < 2; ++high) {
            QEXP_UNROLL
            for (int i = 0; i < R; ++i) {
                const uint32_t upper = weights[i].word[2 * half] >> (4 * high),
                               lower = weights[i].word[2 * half + 1] >> (4 * high);
                const uint32_t a[4] = {decode(upper), decode(lower), decode(upper >> 8), decode(lower >> 8)};
                QEXP_UNROLL
                for (int j = 0; j < C; ++j)
                    mma(sum[i][j], a, x[j].word[4 * half + 2 * high], x[j].word[4 * half + 2 * high + 1]);
            }
        }
    }
    // Sums of the activations themselves: the product with a row of ones.
    template <int C>
    static QEXP_DEVICE void add_up(const Tile (&x)[C], int half, float (&sum)[C][4]) {
        constexpr uint32_t kOne = type == QEXP_BF16 ? 0x3F803F80u : 0x3C003C00u;
        const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
        QEXP_UNROLL
        for (int j = 0; j < C; ++j)
            for (int step = 2 * half; step < 2 * half + 2; ++step)
                mma(sum[j], ones, x[j].word[2 * step], x[j].word[2 * step + 1]);
    }
};

template <class Operand, DecodeScales scales, bool with_zeros, int row_tiles, int column_tiles>
struct W4Decode {
    using Args = Product;
    static constexpr int threads = 256, blocks_per_sm = column_tiles == 1 ? 2 : 1;  // registers: no spills
    static constexpr int kWarps = threads / 32, kAhead = 4, kRows = row_tiles, kColumns = column_tiles;
    static constexpr int kFeatures = 16 * kRows, kTokens = 8 * kColumns;
    static constexpr int kSharedBytes = kWarps * kRows * kColumns * 4 * 32 * 4;
    static constexpr bool kGrouped = scales != DecodeScales::channel;
    // The integer sums of a channel are kept to the end; with group scales every kind ends in floats.
    using Part = typename Operand::Sum;
    using Whole = std::conditional_t<kGrouped, float, Part>;
    using Whole4 = Whole[kRows][kColumns][4];
    using Tile = typename Operand::Tile;

    static QEXP_DEVICE int feature0() { return simt::block_x() * kFeatures; }
    static QEXP_DEVICE int token0() { return simt::block_y() * kTokens; }

    static QEXP_DEVICE void load_weights(const Args& p, int tile, simt::Words4 (&words)[kRows]) {
        QEXP_UNROLL
        for (int i = 0; i < kRows; ++i) {
            const int64_t at = static_cast<int64_t>(feature0() / kTileRows + i) * k_tiles(p.k) + tile;
            if (tile < k_tiles(p.k)) words[i] = simt::load_once(p.w + at * kTileBytes + simt::thread() % 32 * 16);
        }
    }

    static QEXP_DEVICE void load_activations(const Args& p, int tile, Tile (&x)[kColumns]) {
        const int k = tile * kTileColumns, lane = simt::thread() % 32;
        QEXP_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            const int64_t token = token0() + 8 * j + lane / 4;
            const bool valid = token < p.m;
            const char* row = static_cast<const char*>(p.a) + (valid ? token * p.a_stride : 0);
            Operand::load(x[j], row, k, lane % 4, valid && k < p.k, valid && k + 32 < p.k);
        }
    }

    // whole += scale * part (- zero * sums of activations) for the inputs k..
    static QEXP_DEVICE void scale_part(const Args& p, int k, const Part (&part)[kRows][kColumns][4],
                                       const float (&added)[kColumns][4], Whole4& whole) {
        const int64_t group = p.group == 0 ? 0 : k / p.group;
        const int64_t at = group * padded_features(p.n) + feature0() + simt::thread() % 32 / 4;
        const float* table = p.inner != nullptr ? p.inner : p.scale;
        QEXP_UNROLL
        for (int i = 0; i < kRows; ++i)
            for (int half = 0; half < 2; ++half) {
                const float scale = simt::load(table + at + 16 * i + 8 * half);
                float zero = 0.0f;
                if constexpr (with_zeros) zero = simt::load(p.zero + at + 16 * i + 8 * half);
                QEXP_UNROLL
                for (int j = 0; j < kColumns; ++j)
                    for (int c = 2 * half; c < 2 * half + 2; ++c) {
                        whole[i][j][c] = simt::fma(scale, static_cast<float>(part[i][j][c]), whole[i][j][c]);
                        if constexpr (with_zeros) whole[i][j][c] = simt::fma(-zero, added[j][c], whole[i][j][c]);
                    }
            }
    }

    static QEXP_DEVICE void consume(const Args& p, int tile, const simt::Words4 (&words)[kRows],
                                    const Tile (&x)[kColumns], Whole4& whole) {
        if constexpr (!kGrouped) {
            Operand::multiply(words, x, 0, whole);
            Operand::multiply(words, x, 1, whole);
        } else {
            constexpr int kParts = scales == DecodeScales::fine ? 2 : 1;
            QEXP_UNROLL
            for (int half = 0; half < kParts; ++half) {
                const int k = tile * kTileColumns + 32 * half;
                if (k >= p.k) break;
                Part part[kRows][kColumns][4] = {};
                float added[kColumns][4] = {};
                QEXP_UNROLL
                for (int h = half; h < half + 3 - kParts; ++h) {
                    Operand::multiply(words, x, h, part);
                    if constexpr (with_zeros) Operand::add_up(x, h, added);
                }
                scale_part(p, k, part, added, whole);
            }
        }
    }

    // Adds the eight partial sums of a result, in order, and finishes it.
    static QEXP_DEVICE void write(const Args& p, const Whole* sums, int index) {
        const int lane = index % 32, c = index / 32 % 4, j = index / 128 % kColumns, i = index / 128 / kColumns;
        const Cell cell = c_cell(lane, c);
        const int feature = feature0() + 16 * i + cell.row;
        const int64_t token = token0() + 8 * j + cell.column;
        if (feature >= p.n || token >= p.m) return;
        Whole total = 0;
        for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * (kRows * kColumns * 128) + index];
        const int64_t at = token * p.n + feature;
        if (p.out_type == QEXP_I32) {
            static_cast<int*>(p.out)[at] = static_cast<int>(total) >> 4;  // times16_*: exact
            return;
        }
        float y = static_cast<float>(total) * Operand::kUnit;
        if (!kGrouped || p.inner != nullptr) y = simt::multiply(y, simt::load(p.scale + feature));
        if (!with_zeros && p.zero != nullptr) {
            const int groups = group_count(p);
            for (int64_t g = 0; g < groups; ++g)
                y = simt::fma(-simt::load(p.zero + g * padded_features(p.n) + feature),
                              static_cast<float>(simt::load(p.a_sums + token * groups + g)), y);
        }
        if (p.a_scale != nullptr) y = simt::multiply(y, simt::load(p.a_scale + token));
        if (p.bias != nullptr) y += load_number(p.bias, p.bias_type, feature);
        if (size_of(p.out_type) == 2)
            static_cast<uint16_t*>(p.out)[at] = static_cast<uint16_t>(encode(y, p.out_type));
        else
            static_cast<uint32_t*>(p.out)[at] = encode(y, p.out_type);
    }

    static QEXP_DEVICE void run(const Args& p, void* shared) {
        const int warp = simt::thread() / 32, tiles = k_tiles(p.k);
        Whole4 whole = {};
        simt::Words4 words[kAhead][kRows];
        Tile x[kColumns];
        QEXP_UNROLL
        for (int b = 0; b < kAhead; ++b) load_weights(p, warp + b * kWarps, words[b]);
        load_activations(p, warp, x);
        QEXP_NO_UNROLL
        for (int first = warp; first < tiles; first += kAhead * kWarps) {
            QEXP_UNROLL
            for (int b = 0; b < kAhead; ++b) {
                const int tile = first + b * kWarps;
                if (tile >= tiles) break;
                Tile next[kColumns];
                load_activations(p, tile + kWarps, next);
                consume(p, tile, words[b], x, whole);
                load_weights(p, tile + kAhead * kWarps, words[b]);
                QEXP_UNROLL
                for (int j = 0; j < kColumns; ++j) x[j] = next[j];
            }
        }
        Whole* sums = static_cast<Whole*>(shared);
        QEXP_UNROLL
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < kColumns; ++j)
                for (int c = 0; c < 4; ++c)
                    sums[(((warp * kRows + i) * kColumns + j) * 4 + c) * 32 + simt::thread() % 32] = whole[i][j][c];
        simt::sync();
        QEXP_NO_UNROLL
        for (int index = simt::thread(); index < kRows * kColumns * 128; index += threads) write(p, sums, index);
    }
};

}  // namespace qexp::cuda
