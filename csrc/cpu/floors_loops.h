// The loops of floors.h over the vectors of gemm_tiles.h; internal linkage, for the same reason as there.
#pragma once

#include <cstring>

#include "floors.h"
#include "unroll.h"

namespace qexp {
namespace {

constexpr int kChains = 8;  // independent accumulators: enough to hide the latency of any of the instructions

using Line = uint64_t __attribute__((vector_size(64)));

inline Line load_line(const uint64_t* words) {
    Line line;
    std::memcpy(&line, words, sizeof line);
    return line;
}

// Four streams at once, like a tile of four blocks of columns: one alone does not keep the memory busy.
uint64_t read_words(const uint64_t* words, int64_t count) {
    constexpr int64_t kStreams = 4, kWords = 8;
    const int64_t stream = count / (kStreams * kWords) * kWords;
    Line a{}, b{}, c{}, d{};
    for (int64_t i = 0; i < stream; i += kWords) {
        a ^= load_line(words + i);
        b ^= load_line(words + stream + i);
        c ^= load_line(words + 2 * stream + i);
        d ^= load_line(words + 3 * stream + i);
    }
    const Line folded = a ^ b ^ c ^ d;
    uint64_t all = 0;
    for (int64_t i = 0; i < kWords; ++i) all ^= folded[i];
    for (int64_t i = kStreams * stream; i < count; ++i) all ^= words[i];
    return all;
}

template <class V>
int32_t dot_loop(int64_t steps) {
    alignas(64) uint8_t start[64 + kChains];
    for (int i = 0; i < 64 + kChains; ++i) start[i] = static_cast<uint8_t>(i % 16);
    const auto w = V::load_bytes(start);
    auto a = V::broadcast4(reinterpret_cast<const int8_t*>(start) + 4);
    typename V::Bytes more[kChains / 2];
    times<kChains / 2>([&](auto c) QEXP_INLINE { more[c] = V::load_bytes(start + c); });
    typename V::Int acc[kChains];
    times<kChains>([&](auto c) QEXP_INLINE { acc[c] = V::broadcast_int(0); });
    for (; steps > 0; --steps) {
        if constexpr (V::kMadd) {  // eight different products, with the additions in 16 bits that the kernels make, eight before they are widened
            typename V::Short sum[kChains];
            times<kChains>([&](auto c) QEXP_INLINE { sum[c] = V::zero_short(); });
            for (int i = 0; i < 8; ++i) {
                auto b = a;
                __asm__ volatile("" : "+x"(a), "+x"(b));  // or the compiler would multiply once, before the loop
                times<kChains>([&](auto c) QEXP_INLINE {
                    V::add_pairs(sum[c], more[c / 2], c % 2 ? b : a);
                    __asm__ volatile("" : "+x"(sum[c]));  // or it would gather all products first, and spill them
                });
            }
            times<kChains>([&](auto c) QEXP_INLINE { V::add_shorts(acc[c], sum[c]); });
        } else {
            times<kChains>([&](auto c) QEXP_INLINE { V::dot(acc[c], w, a); });
        }
    }
    alignas(64) int32_t lanes[V::kLanes];
    uint32_t all = 0;
    times<kChains>([&](auto c) QEXP_INLINE {
        V::store_ints(lanes, acc[c]);
        for (int32_t lane : lanes) all += static_cast<uint32_t>(lane);
    });
    return static_cast<int32_t>(all);
}

template <class V>
constexpr FloorTable make_floors() {
    return {read_words, dot_loop<V>, int64_t{kChains} * (V::kMadd ? 8 : 1) * V::kLanes * 4 * 2};
}

}  // namespace
}  // namespace qexp
