// The layout "cpu" of 4-bit weights, p16k8, shared by every x86 tier.
//
// [N/16][K/8][64 bytes]: byte 4c + j of a block holds column c; its low nibble is k = 8i + j, the high one
// k = 8i + 4 + j, both stored as code + 8, so that they are the unsigned operand of vpdpbusd and vpmaddubsw. One `and` gives the bytes
// of four k of 16 columns, a shift and an `and` the next four. N is padded to 16 and K to 8 with the weight 0 (code 8).
// A packed weight is one buffer: the header, then the blocks.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace qexp {

constexpr int64_t kBlockColumns = 16, kBlockSteps = 8, kBlockBytes = 64;

struct W4Header {
    char magic[4];    // "QXW4"
    uint8_t version;  // 1
    uint8_t layout;   // qexp/kernels/int4.py numbers them; kLayoutCpu is this one
    uint16_t unused;
    int64_t n, k, group;  // before padding; group 0 = one scale for each column
    char padding[32];
};
constexpr uint8_t kLayoutCpu = 1;
constexpr int64_t kHeaderBytes = 64;
static_assert(sizeof(W4Header) == kHeaderBytes, "the codes start on a cache line");

static constexpr int64_t column_blocks(int64_t n) { return (n + kBlockColumns - 1) / kBlockColumns; }
static constexpr int64_t k_steps(int64_t k) { return (k + kBlockSteps - 1) / kBlockSteps; }
static constexpr int64_t p16k8_bytes(int64_t n, int64_t k) {
    return kHeaderBytes + column_blocks(n) * k_steps(k) * kBlockBytes;
}

struct NibblePlace {
    int64_t byte;  // after the header
    int shift;     // 0 or 4
};

// Where element (column, k) lies.
static constexpr NibblePlace p16k8_place(int64_t column, int64_t k, int64_t steps) {
    const int64_t block = (column / kBlockColumns) * steps + k / kBlockSteps;
    return {block * kBlockBytes + (column % kBlockColumns) * 4 + k % 4, k % kBlockSteps < 4 ? 0 : 4};
}

// canonical [n][k / 2] -> packed, p16k8_bytes(n, k) long, every byte written. k is even.
void prepack_p16k8(const uint8_t* canonical, int64_t n, int64_t k, int64_t group, uint8_t* packed, ParallelFor loop);

// Asks for huge pages behind a big buffer that has not been touched yet; only ever a hint.
void advise_huge_pages(void* begin, int64_t bytes);

}  // namespace qexp
