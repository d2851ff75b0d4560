// The 256-bit VNNI tier. A header, so that a test can compile it a second time with the EVEX encoding of the same
// instruction, which also runs on CPUs that have AVX-512 but not AVX-VNNI.
#pragma once

#include "gemm_vec_avx2base.h"

namespace qexp {
namespace {

struct AvxVnni : Avx2 {
    static constexpr bool kMadd = false;
    static constexpr int kDirectRows = 4, kDirectBlocksFew = 1, kDirectBlocksMany = 1;
    static constexpr int kPanelRows = 6, kPanelBlocks = 1;  // 12 accumulators of 16 registers
    static constexpr int kFloatRows = 4, kFloatBlocksFew = 1, kFloatBlocksMany = 1;

    static void dot(Int& acc, Bytes w, Bytes a) {
#if defined(__AVXVNNI__)
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
#else
        __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
#endif
    }
};

}  // namespace
}  // namespace qexp
