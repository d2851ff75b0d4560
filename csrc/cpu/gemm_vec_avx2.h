// AVX2 without VNNI.
#pragma once

#include "gemm_vec_avx2base.h"

namespace qexp {
namespace {

struct Avx2Madd : Avx2 {
    static constexpr bool kMadd = true;
    static constexpr int kDirectRows = 4, kDirectBlocksFew = 1, kDirectBlocksMany = 1;
    static constexpr int kPanelRows = 4, kPanelBlocks = 1;  // 8 accumulators of 16 bits, 2 operands, of 16 registers
    static constexpr int kFloatRows = 4, kFloatBlocksFew = 1, kFloatBlocksMany = 1;
    using Short = __m256i;

    static Short zero_short() { return _mm256_setzero_si256(); }
    static void add_pairs(Short& sum, Bytes w, Bytes a) { sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, a)); }
    static void add_shorts(Int& acc, Short sum) {
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
};

}  // namespace
}  // namespace qexp
