// AVX-512 with VNNI.
#pragma once

#include "gemm_vec_avx512.h"

namespace qexp {
namespace {

struct Avx512Vnni : Avx512 {
    static constexpr bool kMadd = false;
    static constexpr int kDirectRows = 8, kDirectBlocksFew = 4, kDirectBlocksMany = 2;
    static constexpr int kPanelRows = 7, kPanelBlocks = 2;  // 14 integer and 14 float accumulators, of 32 registers
    static constexpr int kFloatRows = 8, kFloatBlocksFew = 4, kFloatBlocksMany = 2;

    // An instruction of its own: with the intrinsic, gcc 12 keeps big tiles on the stack (880 against 1620 Gop/s).
    static void dot(Int& acc, Bytes w, Bytes a) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a)); }
};

}  // namespace
}  // namespace qexp
