// bf16 and fp16 as 16-bit integers, one value at a time.
#pragma once

#include <cstdint>

#include "hadamard_scale.h"

namespace {

inline float bf16_to_float(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7FFFFFFFu) > kInfBits) return 0x7FC0;
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline float fp16_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(h & 0x7FFFu) << 13;
    if (rest >= 0x0F800000u) return from_bits(sign | kInfBits | (rest & 0x007FFFFFu));
    // The exponent bias differs by 112; the product also normalises subnormals, exactly.
    return from_bits(sign | to_bits(from_bits(rest) * from_bits((127u + 112u) << 23)));
}

inline uint16_t float_to_fp16(float value) {
    const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > kInfBits) return static_cast<uint16_t>(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to 65536 or is Inf
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves a multiple of 2^-24 in the low bits, rounded
        return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000u));
    }
    const uint32_t rounded = magnitude + 0x0FFFu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

}  // namespace
