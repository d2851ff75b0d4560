// The kernels of gemm_table.h, written once over the vectors V of an instruction set.
//
// V names: kLanes int32 lanes; Bytes (4 kLanes of them), Int, Real; kMadd = products are added in 16 bits first.
// Everything here has internal linkage: a copy compiled for one instruction set must not be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#include "gemm_table.h"
#include "p16k8.h"
#include "unroll.h"

namespace qexp {
namespace {

// ---- integer tiles -------------------------------------------------------------------------------------------------

// The weights of one step of 8 k for C vectors of columns. front() and back() are the bytes of its first and second
// four k, loaded one after the other: a tile fills the registers, and one operand less decides whether it fits.
template <class V, int C, bool kPanel, bool kPrefetch = false>
struct Operands {
    static constexpr int64_t kAhead = 2048;  // bytes; a prefetch past the end does no harm
    static constexpr int kParts = kBlockColumns / V::kLanes;  // vectors in a block
    typename V::Bytes source[C];                              // nibbles, unless a panel holds the bytes

    inline QEXP_INLINE void open(const uint8_t* w, int64_t block_stride) {
        if constexpr (!kPanel) {
            times<C>([&](auto c) QEXP_INLINE {
                const uint8_t* place = w + c / kParts * block_stride + c % kParts * 4 * V::kLanes;
                if constexpr (kPrefetch) __builtin_prefetch(place + kAhead);
                source[c] = V::load_bytes(place);
            });
        }
    }
    inline QEXP_INLINE void front(typename V::Bytes (&bytes)[C], const uint8_t* w) const {
        times<C>([&](auto c) QEXP_INLINE {
            if constexpr (kPanel) bytes[c] = V::load_bytes(w + c * 4 * V::kLanes);
            if constexpr (!kPanel) bytes[c] = V::low_nibbles(source[c]);
        });
    }
    inline QEXP_INLINE void back(typename V::Bytes (&bytes)[C], const uint8_t* w) const {
        times<C>([&](auto c) QEXP_INLINE {
            if constexpr (kPanel) bytes[c] = V::load_bytes(w + (C + c) * 4 * V::kLanes);
            if constexpr (!kPanel) bytes[c] = V::high_nibbles(source[c]);
        });
    }
};

// Up to so many rows the loop waits for memory anyway and hardware prefetches best; with more it computes for so long
// between two lines that asking early pays (16 rows: up to 8 % measured).
constexpr int kMemoryBound = 4;

template <class V, int R, int C, bool kPanel>
constexpr int64_t kStepBytes = kPanel ? 2 * C * 4 * V::kLanes : kBlockBytes;

// acc += w a over `steps` steps, by the instruction that sums four products of bytes into an int32.
template <class V, int R, int C, bool kPanel>
inline QEXP_INLINE void accumulate_dot(typename V::Int (&acc)[R][C], const uint8_t*& w,
                                                          int64_t block_stride, const int8_t*& a, int64_t steps) {
    for (; steps > 0; --steps) {
        Operands<V, C, kPanel, (R > kMemoryBound)> o;
        typename V::Bytes bytes[C];
        o.open(w, block_stride);
        o.front(bytes, w);
        times<R>([&](auto r) QEXP_INLINE {
            const auto four = V::broadcast4(a + r * 8);
            times<C>([&](auto c) QEXP_INLINE { V::dot(acc[r][c], bytes[c], four); });
        });
        o.back(bytes, w);
        times<R>([&](auto r) QEXP_INLINE {
            const auto four = V::broadcast4(a + r * 8 + 4);
            times<C>([&](auto c) QEXP_INLINE { V::dot(acc[r][c], bytes[c], four); });
        });
        w += kStepBytes<V, R, C, kPanel>;
        a += R * 8;
    }
}

// The same without that instruction: pairs of products, |pair| <= 2 * 15 * 128, are added in 16 bits, eight of them
// before they must move on to 32 bits (8 * 3840 = 30720 < 32768).
template <class V, int R, int C, bool kPanel>
inline QEXP_INLINE void accumulate_madd(typename V::Int (&acc)[R][C], const uint8_t*& w,
                                                           int64_t block_stride, const int8_t*& a, int64_t steps) {
    constexpr int64_t kStepsInShort = 4;
    while (steps > 0) {
        typename V::Short sum[R][C];
        grid<R, C>([&](auto r, auto c) QEXP_INLINE { sum[r][c] = V::zero_short(); });
        const int64_t now = steps < kStepsInShort ? steps : kStepsInShort;
        for (int64_t i = 0; i < now; ++i) {
            Operands<V, C, kPanel, (R > kMemoryBound)> o;
            typename V::Bytes bytes[C];
            o.open(w, block_stride);
            o.front(bytes, w);
            times<R>([&](auto r) QEXP_INLINE {
                const auto four = V::broadcast4(a + r * 8);
                times<C>([&](auto c) QEXP_INLINE { V::add_pairs(sum[r][c], bytes[c], four); });
            });
            o.back(bytes, w);
            times<R>([&](auto r) QEXP_INLINE {
                const auto four = V::broadcast4(a + r * 8 + 4);
                times<C>([&](auto c) QEXP_INLINE { V::add_pairs(sum[r][c], bytes[c], four); });
            });
            w += kStepBytes<V, R, C, kPanel>;
            a += R * 8;
        }
        grid<R, C>([&](auto r, auto c) QEXP_INLINE { V::add_shorts(acc[r][c], sum[r][c]); });
        steps -= now;
    }
}

template <class V>
inline const float* part(const float* base, int64_t block_stride, int c) {
    constexpr int kParts = kBlockColumns / V::kLanes;
    return base + c / kParts * block_stride + c % kParts * V::kLanes;
}

// The integers of group g begin at -8 times the row's sum, which turns codes + 8 into codes; or go on from the carry.
template <class V, int R, int C>
inline QEXP_INLINE void begin_group(typename V::Int (&acc)[R][C], const TileTask& t, int64_t g) {
    if (t.first) {
        times<R>([&](auto r) QEXP_INLINE {
            const auto sum = static_cast<uint32_t>(t.sums[g * R + r]);  // the caller's, of any size: this must wrap
            const auto start = V::broadcast_int(static_cast<int32_t>(-8u * sum));
            times<C>([&](auto c) QEXP_INLINE { acc[r][c] = start; });
        });
    } else {
        grid<R, C>([&](auto r, auto c) QEXP_INLINE {
            acc[r][c] = V::load_ints(t.carry + r * t.leading + c * V::kLanes);
        });
    }
}

template <class V, int R, int C>
inline QEXP_INLINE void store_carry(const typename V::Int (&acc)[R][C], const TileTask& t) {
    grid<R, C>([&](auto r, auto c) QEXP_INLINE {
        V::store_ints(t.carry + r * t.leading + c * V::kLanes, acc[r][c]);
    });
}

template <class V, int R, int C>
inline QEXP_INLINE void add_group(typename V::Real (&total)[R][C], typename V::Int (&acc)[R][C],
                                                     const TileTask& t, int64_t g) {
    times<C>([&](auto c) QEXP_INLINE {
        const auto scale = V::load_reals(part<V>(t.scale, t.scale_stride, c) + g * kBlockColumns);
        times<R>([&](auto r) QEXP_INLINE { total[r][c] = V::fma(V::to_real(acc[r][c]), scale, total[r][c]); });
    });
    if (t.shift == nullptr) return;
    times<C>([&](auto c) QEXP_INLINE {
        const auto shift = V::load_reals(part<V>(t.shift, t.scale_stride, c) + g * kBlockColumns);
        times<R>([&](auto r) QEXP_INLINE {
            const auto sum = V::broadcast_real(static_cast<float>(t.sums[g * R + r]));
            total[r][c] = V::minus_product(sum, shift, total[r][c]);
        });
    });
}

template <class V, int R, int C, bool kPanel>
void tile(const TileTask& t) {
    typename V::Real total[R][C];
    grid<R, C>([&](auto r, auto c) QEXP_INLINE {
        total[r][c] = V::load_reals(t.total + r * t.leading + c * V::kLanes);
    });
    const uint8_t* w = t.w;
    const int8_t* a = t.a;
    for (int64_t g = 0; g < t.groups; ++g) {
        typename V::Int acc[R][C];
        begin_group<V, R, C>(acc, t, g);
        if constexpr (V::kMadd) {
            accumulate_madd<V, R, C, kPanel>(acc, w, t.block_stride, a, t.steps);
        } else {
            accumulate_dot<V, R, C, kPanel>(acc, w, t.block_stride, a, t.steps);
        }
        if (!t.last) {
            store_carry<V, R, C>(acc, t);
            return;
        }
        add_group<V, R, C>(total, acc, t, g);
    }
    grid<R, C>([&](auto r, auto c) QEXP_INLINE {
        V::store_reals(t.total + r * t.leading + c * V::kLanes, total[r][c]);
    });
}

// ---- unpacking a panel ---------------------------------------------------------------------------------------------

template <class V, int C>
void unpack(const uint8_t* w, int64_t block_stride, int64_t steps, uint8_t* panel) {
    for (int64_t i = 0; i < steps; ++i) {
        Operands<V, C, false> o;
        o.open(w, block_stride);
        times<C>([&](auto c) QEXP_INLINE {
            V::store_bytes(panel + c * 4 * V::kLanes, V::low_nibbles(o.source[c]));
            V::store_bytes(panel + (C + c) * 4 * V::kLanes, V::high_nibbles(o.source[c]));
        });
        w += kBlockBytes;
        panel += 2 * C * 4 * V::kLanes;
    }
}

// ---- float tiles ---------------------------------------------------------------------------------------------------

// acc += w x for one step of 8 k, by fma in the order of k.
template <class V, int R, int C>
inline QEXP_INLINE void float_step(typename V::Real (&acc)[R][C], const typename V::Bytes (&both)[C], const float* x) {
    times<8>([&](auto k) QEXP_INLINE {
        constexpr int kNibble = k < 4 ? 2 * k : 2 * (k - 4) + 1;  // of the lane's 32 bits, lowest first
        typename V::Real value[C];
        times<C>([&](auto c) QEXP_INLINE { value[c] = V::nibble_value(both[c], kNibble); });
        times<R>([&](auto r) QEXP_INLINE {
            const auto here = V::broadcast_real(x[k * R + r]);
            times<C>([&](auto c) QEXP_INLINE { acc[r][c] = V::fma(value[c], here, acc[r][c]); });
        });
    });
}

// The same by the instruction that adds two products of bf16; pairs of k in the order kPairs.
template <class V, int R, int C>
inline QEXP_INLINE void float_step(typename V::Real (&acc)[R][C], const typename V::Bytes (&both)[C],
                                   const uint16_t* x) {
    times<4>([&](auto pair) QEXP_INLINE {
        typename V::Bytes value[C];
        times<C>([&](auto c) QEXP_INLINE { value[c] = V::nibble_pair(both[c], 4 * pair); });
        times<R>([&](auto r) QEXP_INLINE {
            const auto here = V::broadcast_pair(x + (pair * R + r) * 2);
            times<C>([&](auto c) QEXP_INLINE { V::dot_pairs(acc[r][c], value[c], here); });
        });
    });
}

template <class V, int R, int C>
inline QEXP_INLINE void add_piece(const typename V::Real (&acc)[R][C], const FloatTileTask& t,
                                                     int64_t g) {
    times<C>([&](auto c) QEXP_INLINE {
        const auto scale = V::load_reals(part<V>(t.scale, t.scale_stride, c) + g * kBlockColumns);
        times<R>([&](auto r) QEXP_INLINE {
            float* place = t.total + r * t.leading + c * V::kLanes;
            V::store_reals(place, V::fma(acc[r][c], scale, V::load_reals(place)));
        });
    });
}

template <class V, int R, int C>
inline void subtract_shift(const FloatTileTask& t, int64_t g) {
    for (int c = 0; c < C; ++c) {
        const auto shift = V::load_reals(part<V>(t.shift, t.scale_stride, c) + g * kBlockColumns);
        for (int r = 0; r < R; ++r) {
            float* place = t.total + r * t.leading + c * V::kLanes;
            const auto sum = V::broadcast_real(t.sums[g * R + r]);
            V::store_reals(place, V::minus_product(sum, shift, V::load_reals(place)));
        }
    }
}

template <class V, int R, int C>
void float_tile(const FloatTileTask& t) {
    constexpr int64_t kPiece = 16;  // steps: sums of 128 terms, then a sum of those: short chains of rounding errors
    constexpr int kParts = kBlockColumns / V::kLanes;
    const uint8_t* w = t.w;
    const auto* x = static_cast<const typename V::Element*>(t.x);
    for (int64_t g = 0; g < t.groups; ++g) {
        for (int64_t left = t.steps; left > 0; left -= kPiece) {
            typename V::Real acc[R][C];
            grid<R, C>([&](auto r, auto c) QEXP_INLINE { acc[r][c] = V::broadcast_real(0.0f); });
            for (int64_t i = left < kPiece ? left : kPiece; i > 0; --i, w += kBlockBytes, x += R * kBlockSteps) {
                typename V::Bytes both[C];
                times<C>([&](auto c) QEXP_INLINE {
                    both[c] = V::load_bytes(w + c / kParts * t.block_stride + c % kParts * 4 * V::kLanes);
                });
                float_step<V, R, C>(acc, both, x);
            }
            add_piece<V, R, C>(acc, t, g);
        }
        if (t.shift != nullptr) subtract_shift<V, R, C>(t, g);
    }
}

// ---- activations in, results out -----------------------------------------------------------------------------------

// Four bytes of canonical nibbles to eight int8: spread the nibbles, then copy each sign bit upwards.
inline uint64_t spread_nibbles(uint32_t bytes) {
    uint64_t v = bytes;
    v = (v | (v << 16)) & 0x0000FFFF0000FFFFull;
    v = (v | (v << 8)) & 0x00FF00FF00FF00FFull;
    v = (v | (v << 4)) & 0x0F0F0F0F0F0F0F0Full;
    return v | ((v & 0x0808080808080808ull) * 30);  // 8 * 30 = 0xF0: no byte carries into the next
}

// `size` bytes, fewer at the end of a row, zeros beyond. The usual size is a constant: one load, no call of memcpy.
template <class Word>
inline Word load_bytes(const uint8_t* place, int64_t size) {
    Word word = 0;
    if (size >= static_cast<int64_t>(sizeof word)) {
        std::memcpy(&word, place, sizeof word);
    } else {
        std::memcpy(&word, place, static_cast<size_t>(size));
    }
    return word;
}

// Eight values of a row from k on, zeros past its end.
inline uint64_t eight_values(const uint8_t* row, bool nibbles, int64_t k, int64_t left) {
    return nibbles ? spread_nibbles(load_bytes<uint32_t>(row + k / 2, left / 2)) : load_bytes<uint64_t>(row + k, left);
}

// Sum of eight int8: as unsigned bytes v + 128, folded into 16-bit fields that one multiplication adds up.
inline int32_t sum_of(uint64_t values) {
    constexpr uint64_t kEven = 0x00FF00FF00FF00FFull;
    const uint64_t raised = values ^ 0x8080808080808080ull;
    const uint64_t pairs = (raised & kEven) + ((raised >> 8) & kEven);
    return static_cast<int32_t>((pairs * 0x0001000100010001ull) >> 48) - 8 * 128;
}

inline void pack_rows(const PackTask& t) {
    const int64_t steps = k_steps(t.k), group_steps = k_steps(t.group), groups = steps / group_steps;
    for (int r = 0; r < t.rows; ++r) {
        const uint8_t* row = t.a + r * t.row_bytes;
        int8_t* place = t.packed + r * 8;
        for (int64_t g = 0; g < groups; ++g) {
            int32_t sum = 0;
            for (int64_t i = g * group_steps; i < (g + 1) * group_steps; ++i, place += t.rows * 8) {
                const uint64_t values = eight_values(row, t.nibbles, i * 8, t.k - i * 8);
                std::memcpy(place, &values, 8);
                if (t.given == nullptr) sum += sum_of(values);
            }
            t.sums[g * t.rows + r] = t.given == nullptr ? sum : t.given[r * groups + g];
        }
    }
}

template <class V, Float kDtype>
inline void store_as(void* out, int64_t at, typename V::Real value) {
    if constexpr (kDtype == Float::fp32) V::store_reals(static_cast<float*>(out) + at, value);
    if constexpr (kDtype == Float::bf16) V::store_bf16(static_cast<uint16_t*>(out) + at, value);
    if constexpr (kDtype == Float::fp16) V::store_fp16(static_cast<uint16_t*>(out) + at, value);
}

template <class V, Float kDtype>
inline void finish_row(const FinishTask& t, int64_t r) {
    constexpr int64_t kSize = kDtype == Float::fp32 ? 4 : 2;
    const auto factor = V::broadcast_real(t.a_scale == nullptr ? 1.0f : t.a_scale[r]);
    const float* total = t.total + r * t.leading;
    for (int64_t c = 0; c < t.columns; c += V::kLanes) {
        const int64_t left = t.columns - c < V::kLanes ? t.columns - c : V::kLanes;
        float bias[V::kLanes] = {};
        if (t.bias != nullptr) std::memcpy(bias, t.bias + c, static_cast<size_t>(left) * 4);
        const auto value = V::fma(V::load_reals(total + c), factor, V::load_reals(bias));
        if (left == V::kLanes) {
            store_as<V, kDtype>(t.out, r * t.out_stride + c, value);
        } else {
            float edge[V::kLanes];
            store_as<V, kDtype>(edge, 0, value);
            std::memcpy(static_cast<char*>(t.out) + (r * t.out_stride + c) * kSize, edge, left * kSize);
        }
    }
}

template <class V>
void finish(const FinishTask& t) {
    for (int64_t r = 0; r < t.rows; ++r) {
        if (t.dtype == Float::fp32) finish_row<V, Float::fp32>(t, r);
        if (t.dtype == Float::bf16) finish_row<V, Float::bf16>(t, r);
        if (t.dtype == Float::fp16) finish_row<V, Float::fp16>(t, r);
    }
}

// ---- from sizes at run time to tiles -------------------------------------------------------------------------------

template <class V, int kRows, int B, bool kPanel>
void tile_of_rows(const TileTask& t, int rows) {
    constexpr int C = B * static_cast<int>(kBlockColumns) / V::kLanes;
    if (rows == kRows) return tile<V, kRows, C, kPanel>(t);
    if constexpr (kRows > 1) tile_of_rows<V, kRows - 1, B, kPanel>(t, rows);
}

template <class V, int kRows, int B>
void float_tile_of_rows(const FloatTileTask& t, int rows) {
    constexpr int C = B * static_cast<int>(kBlockColumns) / V::kLanes;
    if (rows == kRows) return float_tile<V, kRows, C>(t);
    if constexpr (kRows > 1) float_tile_of_rows<V, kRows - 1, B>(t, rows);
}

template <class V>
void direct_tile(const TileTask& t, int rows, int blocks) {
    constexpr int kFew = V::kDirectRows < 4 ? V::kDirectRows : 4;
    if (blocks == 1) return tile_of_rows<V, V::kDirectRows, 1, false>(t, rows);
    if constexpr (V::kDirectBlocksMany > 1) {
        constexpr int kMany = V::kDirectBlocksMany;
        if (blocks == kMany) return tile_of_rows<V, V::kDirectRows, kMany, false>(t, rows);
    }
    if constexpr (V::kDirectBlocksFew > V::kDirectBlocksMany) {
        tile_of_rows<V, kFew, V::kDirectBlocksFew, false>(t, rows);
    }
}

template <class V>
void panel_tile(const TileTask& t, int rows, int blocks) {
    if (blocks == 1) return tile_of_rows<V, V::kPanelRows, 1, true>(t, rows);
    if constexpr (V::kPanelBlocks > 1) tile_of_rows<V, V::kPanelRows, V::kPanelBlocks, true>(t, rows);
}

template <class V>
void unpack_panel(const uint8_t* w, int64_t block_stride, int64_t steps, int blocks, uint8_t* panel) {
    constexpr int kParts = kBlockColumns / V::kLanes;
    if (blocks == 1) return unpack<V, kParts>(w, block_stride, steps, panel);
    if constexpr (V::kPanelBlocks > 1) unpack<V, kParts * V::kPanelBlocks>(w, block_stride, steps, panel);
}

template <class V>
void float_direct_tile(const FloatTileTask& t, int rows, int blocks) {
    constexpr int kFew = V::kFloatRows < 4 ? V::kFloatRows : 4;
    if (blocks == 1) return float_tile_of_rows<V, V::kFloatRows, 1>(t, rows);
    if constexpr (V::kFloatBlocksMany > 1) {
        if (blocks == V::kFloatBlocksMany) return float_tile_of_rows<V, V::kFloatRows, V::kFloatBlocksMany>(t, rows);
    }
    if constexpr (V::kFloatBlocksFew > V::kFloatBlocksMany) float_tile_of_rows<V, kFew, V::kFloatBlocksFew>(t, rows);
}

template <class V>
constexpr FloatKernels make_float_kernels() {
    return {V::kFloatRows, V::kFloatBlocksFew, V::kFloatBlocksMany, float_direct_tile<V>};
}

template <class V>
constexpr GemmTable make_table() {
    return {V::kDirectRows,  V::kDirectBlocksFew, V::kDirectBlocksMany, V::kPanelRows, V::kPanelBlocks,
            pack_rows,       direct_tile<V>,      unpack_panel<V>,      panel_tile<V>, finish<V>,
            make_float_kernels<V>()};
}

}  // namespace
}  // namespace qexp
