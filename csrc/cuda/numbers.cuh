// Bit tricks on packed weights and accumulators. Each is exact; tests/unit/test_cuda_layouts.py tries all inputs.
#pragma once

#include "qexp_cuda.h"
#include "simt.cuh"

namespace qexp::cuda {

// Eight nibbles to eight s8 that hold 16 q: two's complement needs no sign extension there, three instructions in all.
// The factor leaves with the fp32 scale, exactly: it is a power of two.
QEXP_DEVICE uint32_t times16_low(uint32_t word) { return word << 4 & 0xF0F0F0F0u; }
QEXP_DEVICE uint32_t times16_high(uint32_t word) { return word & 0xF0F0F0F0u; }
constexpr float kSixteenth = 0.0625f;

// Four low nibbles times an integer group scale of 1..15, as s8. (q + 8) u <= 225 stays in its byte; 8 u is subtracted
// bytewise: bit 7 set first keeps borrows inside the byte, and is mended after.
QEXP_DEVICE uint32_t times_scale(uint32_t word, uint32_t scale) {
    constexpr uint32_t kTop = 0x80808080u;
    const uint32_t product = ((word & 0x0F0F0F0Fu) ^ 0x08080808u) * scale;
    return ((product | kTop) - scale * 0x08080808u) ^ (~product & kTop);
}

// Nibbles at bits 0..3 and 16..19 to two exact 16-bit floats: they become the low mantissa bits of 128 (bf16) or 1024
// (half), with the sign bit flipped to make q + 8; the subtraction is exact.
QEXP_DEVICE uint32_t to_bf16x2(uint32_t word) {
    return simt::subtract_bf16x2((word & 0x000F000Fu) ^ 0x43084308u, 0x43084308u);
}
QEXP_DEVICE uint32_t to_half2(uint32_t word) {
    return simt::subtract_half2((word & 0x000F000Fu) ^ 0x64086408u, 0x64086408u);
}

// An int32 accumulator that starts at these bits reads as 1.5 2^23 + sum: a float without a conversion, |sum| < 2^22.
constexpr int kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;
QEXP_DEVICE float from_magic(int bits) { return simt::float_of(static_cast<uint32_t>(bits)) - kMagic; }
// ... and a float plus 1.5 2^23 carries its value, rounded half to even, in its low bits.
QEXP_DEVICE uint32_t to_magic(float value) { return simt::bits_of(value + kMagic); }

QEXP_DEVICE float load_number(const void* from, int type, int64_t index) {
    if (type == QEXP_F32) return simt::load(static_cast<const float*>(from) + index);
    const uint32_t bits = simt::load(static_cast<const uint16_t*>(from) + index);
    return type == QEXP_BF16 ? simt::from_bf16(bits) : simt::from_half(bits);
}
// The bits of a result, in the low half for 16-bit types.
QEXP_DEVICE uint32_t encode(float value, int type) {
    if (type == QEXP_F32) return simt::bits_of(value);
    return type == QEXP_BF16 ? simt::to_bf16(value) : simt::to_half(value);
}
// Two 16-bit results, the first one in the low half.
template <int type>
QEXP_DEVICE uint32_t encode_two(float low, float high) {
    return type == QEXP_BF16 ? simt::to_bf16x2(low, high) : simt::to_half2(low, high);
}
QEXP_BOTH constexpr int size_of(int type) { return type == QEXP_BF16 || type == QEXP_F16 ? 2 : 4; }

}  // namespace qexp::cuda
