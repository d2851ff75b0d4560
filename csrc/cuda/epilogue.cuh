// From accumulators to results: scales, zero points, bias, one rounding, and coalesced stores through shared memory.
#pragma once

#include "numbers.cuh"

namespace qexp::cuda {

using Product = QexpProduct;

QEXP_BOTH constexpr int padded_features(int n) { return (n + kRowPadding - 1) / kRowPadding * kRowPadding; }
QEXP_BOTH constexpr int k_tiles(int k) { return (k + kTileColumns - 1) / kTileColumns; }
QEXP_BOTH constexpr int group_count(const Product& p) { return p.group == 0 ? 1 : p.k / p.group; }

// A staging tile [tokens][features] in shared memory. 16 spare bytes a row put the rows that a warp writes together
// into different banks.
QEXP_BOTH constexpr int staging_pitch(int features, int out_type) { return features * size_of(out_type) + 16; }

// Where a lane's results are: c_cell of operand tiles whose rows are features and whose columns are tokens.
struct Owned {
    int feature, token;    // of the lane's first cell, in the matrix
    int feature0, token0;  // of the block's tile
};

// One operand row tile (16 features) x `columns` tiles of 8 tokens of a lane, on its way out.
template <int columns>
struct RowTile {
    float y[columns][4];

    // y -= zero[g][feature] * a_sums[token][g], for all groups: the weights' zero points.
    QEXP_DEVICE void subtract_zeros(const Product& p, const Owned& own, int tile) {
        const int groups = group_count(p);
        QEXP_NO_UNROLL
        for (int g = 0; g < groups; ++g) {
            const float* zeros = p.zero + static_cast<int64_t>(g) * padded_features(p.n) + own.feature + 16 * tile;
            const float zero[2] = {simt::load(zeros), simt::load(zeros + 8)};
            QEXP_UNROLL
            for (int j = 0; j < columns; ++j) {
                QEXP_UNROLL
                for (int side = 0; side < 2; ++side) {
                    const int64_t token = own.token + 8 * j + side;
                    const float sum =
                        token < p.m ? static_cast<float>(simt::load(p.a_sums + token * groups + g)) : 0.0f;
                    y[j][side] = simt::fma(-zero[0], sum, y[j][side]);
                    y[j][2 + side] = simt::fma(-zero[1], sum, y[j][2 + side]);
                }
            }
        }
    }

    // y <- a_scale[token] y + bias[feature].
    QEXP_DEVICE void finish(const Product& p, const Owned& own, int tile) {
        float bias[2] = {0.0f, 0.0f};
        if (p.bias != nullptr)
            for (int half = 0; half < 2; ++half) {
                const int feature = own.feature + 16 * tile + 8 * half;
                if (feature < p.n) bias[half] = load_number(p.bias, p.bias_type, feature);
            }
        QEXP_UNROLL
        for (int j = 0; j < columns; ++j) {
            QEXP_UNROLL
            for (int side = 0; side < 2; ++side) {
                const int token = own.token + 8 * j + side;
                const float scale = p.a_scale != nullptr && token < p.m ? simt::load(p.a_scale + token) : 1.0f;
                y[j][side] = simt::multiply(y[j][side], scale) + bias[0];
                y[j][2 + side] = simt::multiply(y[j][2 + side], scale) + bias[1];
            }
        }
    }

    QEXP_DEVICE void stage(const Product& p, const Owned& own, int tile, void* staging, int pitch) const {
        const int size = size_of(p.out_type);
        QEXP_UNROLL
        for (int j = 0; j < columns; ++j) {
            QEXP_UNROLL
            for (int c = 0; c < 4; ++c) {
                const int column = own.feature - own.feature0 + 16 * tile + 8 * (c >> 1);
                char* row = static_cast<char*>(staging) + (own.token - own.token0 + 8 * j + (c & 1)) * pitch;
                // The exact integer product travels as the bits of y.
                const uint32_t bits = p.out_type == QEXP_I32 ? simt::bits_of(y[j][c]) : encode(y[j][c], p.out_type);
                if (size == 2)
                    reinterpret_cast<uint16_t*>(row)[column] = static_cast<uint16_t>(bits);
                else
                    reinterpret_cast<uint32_t*>(row)[column] = bits;
            }
        }
    }
};

// Copies a staging tile of `features` x `tokens` to the result: 16 bytes a thread where rows are aligned and complete.
template <int features, int tokens, int threads>
QEXP_DEVICE void store(const Product& p, const void* staging, int pitch, int feature0, int token0, int thread) {
    const int size = size_of(p.out_type), chunks = features * size / 16, each = 16 / size;
    const bool aligned = static_cast<int64_t>(p.n) * size % 16 == 0;
    QEXP_NO_UNROLL
    for (int i = thread; i < tokens * chunks; i += threads) {
        const int token = token0 + i / chunks, column = i % chunks * each, feature = feature0 + column;
        if (token >= p.m || feature >= p.n) continue;
        const char* from = static_cast<const char*>(staging) + (token - token0) * pitch + column * size;
        char* to = static_cast<char*>(p.out) + (static_cast<int64_t>(token) * p.n + feature) * size;
        if (aligned) {
            *reinterpret_cast<simt::Words4*>(to) = *reinterpret_cast<const simt::Words4*>(from);
            continue;
        }
        const int count = p.n - feature < each ? p.n - feature : each;
        for (int e = 0; e < count; ++e) {
            if (size == 2)
                reinterpret_cast<uint16_t*>(to)[e] = reinterpret_cast<const uint16_t*>(from)[e];
            else
                reinterpret_cast<uint32_t*>(to)[e] = reinterpret_cast<const uint32_t*>(from)[e];
        }
    }
}

}  // namespace qexp::cuda
