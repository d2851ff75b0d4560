// W4A8 and W4A4 by mma.sync, for every chip since sm_80: features are the 16 rows of an operand tile, tokens its
// columns.
//
// A block makes 128 features x 64 or 128 tokens, in steps of 64 inputs that cp.async brings into a ring of four stages.
// A warp unpacks its weights in registers (numbers.cuh) and reads activations with ldmatrix. Scales:
//   channel    one fp32 scale a row, int32 accumulators to the end;
//   group      the accumulators of each group (or of 128 inputs, whichever is shorter) are scaled into fp32 sums;
//   fine       the same every 32 inputs, for groups that are no multiple of 64;
//   two_level  integer scales of 1..15 multiply the weights while they are unpacked, one fp32 scale a row remains.
#pragma once

#include "epilogue.cuh"

namespace qexp::cuda {

enum class Scales { channel, group, fine, two_level };

template <int token_count, Scales scales, bool native_s4>
struct W4Tile {
    using Args = Product;
    static constexpr int threads = 256, blocks_per_sm = scales == Scales::channel ? 2 : 1;
    static constexpr int kFeatures = 128, kTokens = token_count, kStages = 4;
    static constexpr int kFeatureWarps = 4, kTokenWarps = 2;
    static constexpr int kRows = kFeatures / kFeatureWarps / kTileRows, kColumns = kTokens / kTokenWarps / 8;
    static constexpr int kActivationBytes = kTokens * (native_s4 ? 32 : 64);  // of a stage: 64 inputs a token
    static constexpr int kStageBytes = kActivationBytes + kFeatures / kTileRows * kTileBytes;
    static constexpr bool kGrouped = scales == Scales::group || scales == Scales::fine;
    static constexpr int kStart = kGrouped ? kMagicBits : 0;
    // What one unit of an accumulator is worth: s8 operands made by times16_* hold 16 q.
    static constexpr float kUnit = native_s4 || scales == Scales::two_level ? 1.0f : kSixteenth;

    static int shared_bytes(int out_type) {
        const int staged = kTokens * staging_pitch(kFeatures, out_type), ring = kStages * kStageBytes;
        return staged > ring ? staged : ring;
    }

    struct Lane {
        int warp_row, warp_column, id;
        QEXP_DEVICE Lane() {
            const int warp = simt::thread() / 32;
            warp_row = warp % kFeatureWarps, warp_column = warp / kFeatureWarps, id = simt::thread() % 32;
        }
    };

    struct Sums {
        int whole[kRows][kColumns][4];
        float scaled[kGrouped ? kRows : 1][kGrouped ? kColumns : 1][4];
    };

    static QEXP_DEVICE int feature0() { return simt::block_x() * kFeatures; }
    static QEXP_DEVICE int token0() { return simt::block_y() * kTokens; }

    // Addresses are a uniform base and a 32-bit offset: registers are what limits this kernel.
    static QEXP_DEVICE void fetch(const Args& p, char* ring, int step) {
        char* stage = ring + step % kStages * kStageBytes;
        constexpr int kChunks = native_s4 ? 2 : 4;
        const int stride = static_cast<int>(p.a_stride), row_bytes = native_s4 ? k_tiles(p.k) * 32 : p.k;
        const char* activations = static_cast<const char*>(p.a) + token0() * p.a_stride;
        QEXP_UNROLL
        for (int i = simt::thread(); i < kTokens * kChunks; i += threads) {
            const int row = i / kChunks, chunk = i % kChunks, byte = (step * kChunks + chunk) * 16;
            const bool valid = token0() + row < p.m && byte < row_bytes;
            simt::copy_async(stage + (native_s4 ? row * 32 + chunk * 16 : chunk_in_64(row, chunk)),
                             activations + (valid ? row * stride + byte : 0), valid);
        }
        const uint8_t* weights = p.w + static_cast<int64_t>(feature0() / kTileRows) * k_tiles(p.k) * kTileBytes;
        QEXP_UNROLL
        for (int i = simt::thread(); i < kFeatures / kTileRows * 32; i += threads)
            simt::copy_async(stage + kActivationBytes + i * 16,
                             weights + (i / 32 * k_tiles(p.k) + step) * kTileBytes + i % 32 * 16, true);
    }

    // Operand registers of one 16-row tile for 32 inputs, from the lane's two words.
    static QEXP_DEVICE void unpack(const simt::Words2& words, const uint32_t (&inner)[2], uint32_t (&a)[4]) {
        QEXP_UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t word = words.word[half];
            if constexpr (scales == Scales::two_level) {
                a[half] = times_scale(word, inner[half]);
                a[2 + half] = times_scale(word >> 4, inner[half]);
            } else {
                a[half] = times16_low(word);
                a[2 + half] = times16_high(word);
            }
        }
    }

    // sums.scaled += scale * sums.whole, for the group that ends here.
    static QEXP_DEVICE void flush(const float (&scale)[kRows][2], Sums& sums) {
        if constexpr (kGrouped) {
            QEXP_UNROLL
            for (int i = 0; i < kRows; ++i) {
                QEXP_UNROLL
                for (int j = 0; j < kColumns; ++j) {
                    QEXP_UNROLL
                    for (int c = 0; c < 4; ++c) {
                        sums.scaled[i][j][c] =
                            simt::fma(scale[i][c >> 1], from_magic(sums.whole[i][j][c]), sums.scaled[i][j][c]);
                        sums.whole[i][j][c] = kMagicBits;
                    }
                }
            }
        }
    }

    static QEXP_DEVICE void load_scales(const Args& p, const float* table, int k, const Lane& lane,
                                        float (&scale)[kRows][2]) {
        const float* row =
            table + static_cast<int64_t>(k / p.group) * padded_features(p.n) + feature0() + lane.warp_row * kRows * 16;
        QEXP_UNROLL
        for (int i = 0; i < kRows; ++i)
            for (int half = 0; half < 2; ++half) scale[i][half] = simt::load(row + 16 * i + 8 * half + lane.id / 4);
    }

    // Half a stage: 32 inputs. One ldmatrix brings the operands of two tiles of 8 tokens.
    static QEXP_DEVICE void multiply(const char* stage, const Lane& lane, int half, const uint32_t (&inner)[kRows][2],
                                     Sums& sums) {
        const char* weights = stage + kActivationBytes + lane.warp_row * kRows * kTileBytes + lane.id * 16 + half * 8;
        uint32_t a[kRows][4];
        QEXP_UNROLL
        for (int i = 0; i < kRows; ++i)
            unpack(*reinterpret_cast<const simt::Words2*>(weights + i * kTileBytes), inner[i], a[i]);
        const int row = lane.warp_column * kColumns * 8 + lane.id / 16 * 8 + lane.id % 8;
        const char* activations = stage + chunk_in_64(row, 2 * half + lane.id / 8 % 2);
        QEXP_UNROLL
        for (int j = 0; j < kColumns; j += 2) {
            uint32_t b[4];
            simt::load_matrices(b, activations + j * 8 * 64);  // 16 rows on, the permutation of chunks is the same
            QEXP_UNROLL
            for (int i = 0; i < kRows; ++i) {
                simt::mma_s8(sums.whole[i][j], a[i], b[0], b[1]);
                simt::mma_s8(sums.whole[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }

    // The same for 64 inputs with 4-bit operands, which need no unpacking.
    static QEXP_DEVICE void multiply_s4(const char* stage, const Lane& lane, Sums& sums) {
        const char* weights = stage + kActivationBytes + lane.warp_row * kRows * kTileBytes + lane.id * 16;
        simt::Words4 a[kRows];
        QEXP_UNROLL
        for (int i = 0; i < kRows; ++i) a[i] = *reinterpret_cast<const simt::Words4*>(weights + i * kTileBytes);
        QEXP_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            const int row = (lane.warp_column * kColumns + j) * 8 + lane.id / 4;
            const simt::Words2 b = *reinterpret_cast<const simt::Words2*>(stage + row * 32 + lane.id % 4 * 8);
            QEXP_UNROLL
            for (int i = 0; i < kRows; ++i) simt::mma_s4(sums.whole[i][j], a[i].word, b.word[0], b.word[1]);
        }
    }

    static QEXP_DEVICE void multiply_stage(const char* stage, const Lane& lane, const uint32_t (&inner)[kRows][2],
                                           Sums& sums) {
        if constexpr (native_s4) {
            multiply_s4(stage, lane, sums);
        } else {
            multiply(stage, lane, 0, inner, sums);
            multiply(stage, lane, 1, inner, sums);
        }
    }

    // One stage of the ring: 64 inputs.
    static QEXP_DEVICE void consume(const Args& p, const char* stage, int step, const Lane& lane, Sums& sums) {
        const int k = step * kTileColumns;
        uint32_t inner[kRows][2] = {};
        float scale[kRows][2];
        if constexpr (scales == Scales::channel) {
            multiply_stage(stage, lane, inner, sums);
        } else if constexpr (scales == Scales::two_level) {
            load_scales(p, p.inner, k, lane, scale);
            QEXP_UNROLL
            for (int i = 0; i < kRows; ++i)
                for (int half = 0; half < 2; ++half) inner[i][half] = static_cast<uint32_t>(scale[i][half]);
            multiply_stage(stage, lane, inner, sums);
        } else if constexpr (scales == Scales::group) {
            load_scales(p, p.scale, k, lane, scale);  // early: needed after the products
            multiply_stage(stage, lane, inner, sums);
            // Magic accumulators hold 128 inputs; a group of a multiple of 128 is scaled every second step.
            if (p.group % 128 != 0 || step % 2 == 1) flush(scale, sums);
        } else {
            QEXP_UNROLL
            for (int half = 0; half < 2 && k + 32 * half < p.k; ++half) {
                load_scales(p, p.scale, k + 32 * half, lane, scale);
                multiply(stage, lane, half, inner, sums);
                flush(scale, sums);
            }
        }
    }

    static QEXP_DEVICE void write(const Args& p, char* shared, const Lane& lane, const Sums& sums) {
        const Owned own{feature0() + lane.warp_row * kRows * 16 + lane.id / 4,
                        token0() + lane.warp_column * kColumns * 8 + lane.id % 4 * 2, feature0(), token0()};
        const int pitch = staging_pitch(kFeatures, p.out_type);
        QEXP_UNROLL
        for (int i = 0; i < kRows; ++i) {
            RowTile<kColumns> tile;
            QEXP_UNROLL
            for (int c = 0; c < 4; ++c) {
                const bool per_row = !kGrouped && p.out_type != QEXP_I32;
                const float scale = per_row ? kUnit * simt::load(p.scale + own.feature + 16 * i + 8 * (c >> 1)) : kUnit;
                QEXP_UNROLL
                for (int j = 0; j < kColumns; ++j) {
                    const int whole = sums.whole[i][j][c];
                    if (p.out_type == QEXP_I32)
                        tile.y[j][c] = simt::float_of(static_cast<uint32_t>(kUnit == 1.0f ? whole : whole >> 4));
                    else if constexpr (kGrouped)
                        tile.y[j][c] = sums.scaled[i][j][c] * scale;
                    else
                        tile.y[j][c] = static_cast<float>(whole) * scale;
                }
            }
            if (p.out_type != QEXP_I32) {
                if (p.zero != nullptr) tile.subtract_zeros(p, own, i);
                tile.finish(p, own, i);
            }
            tile.stage(p, own, i, shared, pitch);
        }
        simt::sync();
        store<kFeatures, kTokens, threads>(p, shared, pitch, feature0(), token0(), simt::thread());
    }

    static QEXP_DEVICE void run(const Args& p, void* shared) {
        char* ring = static_cast<char*>(shared);
        const Lane lane;
        const int steps = k_tiles(p.k);
        Sums sums;
        QEXP_UNROLL
        for (int i = 0; i < kRows; ++i) {
            QEXP_UNROLL
            for (int j = 0; j < kColumns; ++j) {
                QEXP_UNROLL
                for (int c = 0; c < 4; ++c) {
                    sums.whole[i][j][c] = kStart;
                    if constexpr (kGrouped) sums.scaled[i][j][c] = 0.0f;
                }
            }
        }
        QEXP_UNROLL
        for (int step = 0; step < kStages - 1; ++step) {
            if (step < steps) fetch(p, ring, step);
            simt::copy_commit();
        }
        QEXP_NO_UNROLL
        for (int step = 0; step < steps; ++step) {
            simt::copy_wait<kStages - 2>();
            simt::sync();  // the stage has landed for all, and the one fetched into next is free
            if (step + kStages - 1 < steps) fetch(p, ring, step + kStages - 1);
            simt::copy_commit();
            consume(p, ring + step % kStages * kStageBytes, step, lane, sums);
        }
        simt::copy_wait<0>();
        simt::sync();  // the staging tile takes the ring's place
        write(p, ring, lane, sums);
    }
};

}  // namespace qexp::cuda
