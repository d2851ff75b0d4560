// W4A8 and W4A4 for sm_90a: s8 wgmma with the weights in registers and the activations in shared memory.
//
// A block makes 128 features x 128 or 256 tokens. One thread of the first warpgroup feeds a ring of stages of 128
// inputs through the bulk copy engine; two warpgroups of 64 features each unpack their weights (the same layout and the
// same three instructions per eight weights as everywhere) and issue products without waiting: while the tensor cores
// work on one stage, the next one is unpacked into the other set of operand registers.
#pragma once

#include "epilogue.cuh"
#include "simt_sm90.cuh"

namespace qexp::cuda {

enum class WgmmaScales { channel, group, two_level };

struct WgmmaArgs {
    Product p;
    simt::TensorMap activations;
};

template <int token_count, WgmmaScales scales>
struct W4Wgmma {
    using Args = WgmmaArgs;
    static constexpr int threads = 384, blocks_per_sm = 1;
    static constexpr int kFeatures = 128, kTokens = token_count, kColumns = kTokens / 8;
    static constexpr int kDepth = 128, kTiles = kDepth / kTileColumns;  // inputs of a stage
    static constexpr int kActivationBytes = kTokens * kDepth, kWeightBytes = kFeatures * kDepth / 2;
    static constexpr int kStageBytes = kActivationBytes + kWeightBytes;
    static constexpr int kStages = token_count == 256 ? 5 : 8;
    static constexpr int kBarriers = kStages * kStageBytes;  // behind the ring
    static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
    static constexpr int kConsumers = 256;
    static constexpr bool kGrouped = scales == WgmmaScales::group;
    static constexpr float kUnit = scales == WgmmaScales::two_level ? 1.0f : kSixteenth;
    static_assert(kTokens * staging_pitch(kFeatures, QEXP_F32) <= kBarriers && kStageBytes % 1024 == 0);

    struct Ring {
        char* shared;
        QEXP_DEVICE char* stage(int i) const { return shared + i * kStageBytes; }
        QEXP_DEVICE simt::Barrier* full(int i) const {
            return reinterpret_cast<simt::Barrier*>(shared + kBarriers) + i;
        }
        QEXP_DEVICE simt::Barrier* empty(int i) const { return full(kStages + i); }
    };

    struct Sums {
        int whole[kColumns][4];
        float scaled[kGrouped ? kColumns : 1][4];
    };

    static QEXP_DEVICE int feature0() { return simt::block_x() * kFeatures; }
    static QEXP_DEVICE int token0() { return simt::block_y() * kTokens; }
    static QEXP_DEVICE int steps(const Product& p) { return (p.k + kDepth - 1) / kDepth; }

    static QEXP_DEVICE void produce(const Args& args, const Ring& ring) {
        const Product& p = args.p;
        const int across = k_tiles(p.k);
        const uint8_t* weights = p.w + static_cast<int64_t>(feature0() / kTileRows) * across * kTileBytes;
        QEXP_NO_UNROLL
        for (int step = 0; step < steps(p); ++step) {
            const int at = step % kStages, tiles = across - step * kTiles < kTiles ? across - step * kTiles : kTiles;
            // Waiting for the phase before the first one succeeds at once: the ring starts empty.
            simt::barrier_wait(ring.empty(at), (step / kStages & 1) ^ 1);
            // Inputs past the end arrive as zero activations, whatever the weights in the stage are.
            simt::barrier_expect(ring.full(at), kActivationBytes + kFeatures / kTileRows * tiles * kTileBytes);
            simt::copy_box(ring.stage(at), &args.activations, step * kDepth, token0(), ring.full(at));
            for (int row = 0; row < kFeatures / kTileRows; ++row)
                simt::copy_bulk(ring.stage(at) + kActivationBytes + row * kTiles * kTileBytes,
                                weights + (row * across + step * kTiles) * kTileBytes, tiles * kTileBytes,
                                ring.full(at));
        }
    }

    // The lane's operand registers for one tile of 16 features x 64 inputs.
    static QEXP_DEVICE void unpack(const simt::Words4& words, const uint32_t (&inner)[2], uint32_t (&a)[2][4]) {
        QEXP_UNROLL
        for (int half = 0; half < 2; ++half) {
            QEXP_UNROLL
            for (int side = 0; side < 2; ++side) {
                const uint32_t word = words.word[2 * half + side];
                if constexpr (scales == WgmmaScales::two_level) {
                    a[half][side] = times_scale(word, inner[side]);
                    a[half][2 + side] = times_scale(word >> 4, inner[side]);
                } else {
                    a[half][side] = times16_low(word);
                    a[half][2 + side] = times16_high(word);
                }
            }
        }
    }

    static QEXP_DEVICE int row_of_lane() { return (simt::thread() - 128) / 32 * 16 + simt::thread() % 32 / 4; }

    static QEXP_DEVICE float row_value(const Product& p, const float* table, int k, int side) {
        const int64_t group = p.group == 0 ? 0 : (k < p.k ? k : p.k - 1) / p.group;
        return simt::load(table + group * padded_features(p.n) + feature0() + row_of_lane() + 8 * side);
    }

    static QEXP_DEVICE void load_weights(const Product& p, const char* stage, int step, uint32_t (&a)[kTiles][2][4]) {
        const char* weights =
            stage + kActivationBytes + (simt::thread() - 128) / 32 * kTiles * kTileBytes + simt::thread() % 32 * 16;
        QEXP_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
            uint32_t inner[2] = {};
            if constexpr (scales == WgmmaScales::two_level)
                for (int side = 0; side < 2; ++side)
                    inner[side] =
                        static_cast<uint32_t>(row_value(p, p.inner, step * kDepth + tile * kTileColumns, side));
            unpack(*reinterpret_cast<const simt::Words4*>(weights + tile * kTileBytes), inner, a[tile]);
        }
    }

    static QEXP_DEVICE void multiply_tile(const char* stage, int tile, const uint32_t (&a)[2][4], Sums& sums) {
        const uint64_t b = simt::operand_in_128(stage);
        QEXP_UNROLL
        for (int half = 0; half < 2; ++half) simt::wgmma_s8(sums.whole, a[half], b + (2 * tile + half) * (32 / 16));
    }

    // Issues the products of one stage; those of the stage before are then complete and it is handed back.
    static QEXP_DEVICE void consume(const Product& p, const Ring& ring, int step, uint32_t (&a)[kTiles][2][4],
                                    Sums& sums) {
        const int at = step % kStages;
        simt::barrier_wait(ring.full(at), step / kStages & 1);
        load_weights(p, ring.stage(at), step, a);
        simt::wgmma_fence();
        QEXP_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) multiply_tile(ring.stage(at), tile, a[tile], sums);
        simt::wgmma_commit();
        simt::wgmma_wait<1>();
        if (step > 0) simt::barrier_arrive(ring.empty((step - 1) % kStages));
    }

    // The same where each group's sums are scaled into floats: nothing is left in flight.
    static QEXP_DEVICE void consume_group(const Product& p, const Ring& ring, int step, uint32_t (&a)[kTiles][2][4],
                                          Sums& sums) {
        const int at = step % kStages;
        simt::barrier_wait(ring.full(at), step / kStages & 1);
        load_weights(p, ring.stage(at), step, a);
        const bool whole_stage = p.group % kDepth == 0;
        QEXP_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
            const int k = step * kDepth + tile * kTileColumns;
            const float scale[2] = {row_value(p, p.scale, k, 0), row_value(p, p.scale, k, 1)};
            simt::wgmma_fence();
            multiply_tile(ring.stage(at), tile, a[tile], sums);
            simt::wgmma_commit();
            simt::wgmma_wait<0>();
            if (whole_stage && tile + 1 < kTiles) continue;
            QEXP_UNROLL
            for (int j = 0; j < kColumns; ++j) {
                QEXP_UNROLL
                for (int c = 0; c < 4; ++c) {
                    if constexpr (kGrouped)
                        sums.scaled[j][c] = simt::fma(scale[c >> 1], from_magic(sums.whole[j][c]), sums.scaled[j][c]);
                    sums.whole[j][c] = kMagicBits;
                }
            }
        }
        simt::barrier_arrive(ring.empty(at));
    }

    static QEXP_DEVICE void accumulate(const Product& p, const Ring& ring, Sums& sums) {
        QEXP_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            QEXP_UNROLL
            for (int c = 0; c < 4; ++c) {
                sums.whole[j][c] = kGrouped ? kMagicBits : 0;
                if constexpr (kGrouped) sums.scaled[j][c] = 0.0f;
            }
        }
        uint32_t even[kTiles][2][4], odd[kTiles][2][4];
        const int count = steps(p);
        if constexpr (kGrouped) {
            QEXP_NO_UNROLL
            for (int step = 0; step < count; ++step) consume_group(p, ring, step, even, sums);
        } else {
            QEXP_NO_UNROLL
            for (int step = 0; step + 1 < count; step += 2) {
                consume(p, ring, step, even, sums);
                consume(p, ring, step + 1, odd, sums);
            }
            if (count % 2 == 1) consume(p, ring, count - 1, even, sums);
            simt::wgmma_wait<0>();
        }
    }

    // Results leave in pieces of 64 tokens: the accumulators leave no registers for more.
    static constexpr int kPiece = 8;
    using Piece = RowTile<kPiece>;

    // 16-bit results of a piece: four matrices of 8 features x 8 tokens at a time, turned to rows of tokens.
    template <int type>
    static QEXP_DEVICE void stage_16(const Piece& piece, char* staging, int pitch) {
        const int lane = simt::thread() % 32, column = (simt::thread() - 128) / 32 * 16 + lane / 8 % 2 * 8;
        char* row = staging + (lane / 16 * 8 + lane % 8) * pitch + column * 2;
        QEXP_UNROLL
        for (int j = 0; j < kPiece; j += 2) {
            uint32_t r[4];
            QEXP_UNROLL
            for (int m = 0; m < 4; ++m)
                r[m] = encode_two<type>(piece.y[j + m / 2][m % 2 * 2], piece.y[j + m / 2][m % 2 * 2 + 1]);
            simt::store_matrices_transposed(row + 8 * j * pitch, r);
        }
    }

    // The lane's results before zeros, activation scales and bias: tokens from tile `first` on.
    static QEXP_DEVICE void read_piece(const Product& p, const Sums& sums, int first, const float (&scale)[2],
                                       Piece& piece) {
        QEXP_UNROLL
        for (int j = 0; j < kPiece; ++j) {
            QEXP_UNROLL
            for (int c = 0; c < 4; ++c) {
                const int whole = sums.whole[first + j][c];
                if (p.out_type == QEXP_I32)
                    piece.y[j][c] = simt::float_of(static_cast<uint32_t>(kUnit == 1.0f ? whole : whole >> 4));
                else if constexpr (kGrouped)
                    piece.y[j][c] = sums.scaled[first + j][c] * scale[c >> 1];
                else
                    piece.y[j][c] = static_cast<float>(whole) * scale[c >> 1];
            }
        }
    }

    static QEXP_DEVICE void write(const Product& p, char* staging, const Sums& sums) {
        const int pitch = staging_pitch(kFeatures, p.out_type);
        Owned own{feature0() + row_of_lane(), token0() + simt::thread() % 4 * 2, feature0(), token0()};
        float scale[2];
        for (int side = 0; side < 2; ++side) {
            const bool per_row = !kGrouped && p.out_type != QEXP_I32;
            scale[side] = per_row ? kUnit * simt::load(p.scale + own.feature + 8 * side) : kUnit;
        }
        QEXP_UNROLL
        for (int first = 0; first < kColumns; first += kPiece) {
            Piece piece;
            read_piece(p, sums, first, scale, piece);
            if (p.out_type != QEXP_I32) {
                if (p.zero != nullptr) piece.subtract_zeros(p, own, 0);
                piece.finish(p, own, 0);
            }
            char* rows = staging + 8 * first * pitch;
            if (p.out_type == QEXP_BF16)
                stage_16<QEXP_BF16>(piece, rows, pitch);
            else if (p.out_type == QEXP_F16)
                stage_16<QEXP_F16>(piece, rows, pitch);
            else
                piece.stage(p, own, 0, staging, pitch);
            own.token += 8 * kPiece;
        }
        simt::sync_some(1, kConsumers);
        store<kFeatures, kTokens, kConsumers>(p, staging, pitch, feature0(), token0(), simt::thread() - 128);
    }

    static QEXP_DEVICE void run(const Args& args, void* shared) {
        const Ring ring{static_cast<char*>(shared)};
        if (simt::thread() == 0) {
            for (int i = 0; i < kStages; ++i) {
                simt::barrier_init(ring.full(i), 1);
                simt::barrier_init(ring.empty(i), kConsumers);
            }
            simt::barrier_fence();
        }
        simt::sync();
        if (simt::thread() < 128) {
            simt::fewer_registers<40>();
            if (simt::thread() == 0) produce(args, ring);
        } else {
            simt::more_registers<232>();
            Sums sums;
            accumulate(args.p, ring, sums);
            simt::sync_some(1, kConsumers);  // both are done with the ring: the staging tile takes its place
            write(args.p, ring.shared, sums);
        }
    }
};

}  // namespace qexp::cuda
