// From the largest magnitude of a group to its scale and to the factor that turns values into codes.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr uint32_t kInfBits = 0x7F800000u;  // magnitudes from here on are Inf or NaN
constexpr uint32_t kNanBits = 0x7FC00000u;
constexpr float kTiny = 1.17549435e-38f;  // the least normal float: 1 / kTiny is finite

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct Scale {
    float scale;  // of one code; 0 for a zero group, NaN for a group that is not finite
    float step;   // codes = round(value * step)
    bool good;    // false: every code is 0
};

inline Scale scale_of(uint32_t magnitude, float norm, float clip, int bits) {
    if (magnitude >= kInfBits) return {from_bits(kNanBits), 0.0f, false};
    const float amax = from_bits(magnitude) * norm;
    if (amax == 0.0f) return {0.0f, 0.0f, false};
    const float top = static_cast<float>((1 << (bits - 1)) - 1);
    const float raw = amax * clip / top;
    const float scale = raw < kTiny ? kTiny : raw;
    return {scale, 1.0f / scale * norm, true};
}

}  // namespace
