// AVX-512 without VNNI.
#pragma once

#include "gemm_vec_avx512.h"

namespace qexp {
namespace {

struct Avx512Bw : Avx512 {
    static constexpr bool kMadd = true;
    static constexpr int kDirectRows = 8, kDirectBlocksFew = 4, kDirectBlocksMany = 2;
    static constexpr int kPanelRows = 8, kPanelBlocks = 2;
    static constexpr int kFloatRows = 8, kFloatBlocksFew = 4, kFloatBlocksMany = 2;
    using Short = __m512i;

    static Short zero_short() { return _mm512_setzero_si512(); }
    static void add_pairs(Short& sum, Bytes w, Bytes a) { sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, a)); }
    static void add_shorts(Int& acc, Short sum) {
        acc = _mm512_add_epi32(acc, _mm512_madd_epi16(sum, _mm512_set1_epi16(1)));
    }
};

}  // namespace
}  // namespace qexp
