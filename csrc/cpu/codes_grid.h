// From the range of a group to its grid, in the operations and the order of qexp/kernels/quantize.py.
#pragma once

#include "codes.h"
#include "hadamard_scale.h"

namespace {

constexpr float kEpsilon = 1.1920929e-07f;

struct Range {
    float low, high;  // NaN if a value was
};

struct Grid {
    float scale, inverse, zero;  // code = clamp(round(x inverse) + zero), x^ = scale (code - zero)
};

inline float larger(float a, float b) { return a < b ? b : a; }  // a where b is NaN

inline Grid symmetric_grid(Range range, const qexp::GridRule& rule) {
    const float top = static_cast<float>((1 << (rule.bits - 1)) - 1);
    const float raw = larger(-range.low, range.high) * rule.clip / top;
    const float scale = raw < kTiny ? kTiny : raw;
    return {scale, 1.0f / scale, top + 1.0f};
}

inline Grid asymmetric_grid(Range range, const qexp::GridRule& rule) {
    const float low = rule.widen && range.low > 0.0f ? 0.0f : range.low;
    const float high = rule.widen && range.high < 0.0f ? 0.0f : range.high;
    const float top = static_cast<float>((1 << rule.bits) - 1);
    const float floor = larger(-low, high) * kEpsilon + kTiny;  // so that a constant row c comes out as c
    const float scale = larger((high - low) * rule.clip / top, floor);
    // + 0 makes 0 of -0: which of two zeros is the least of a group depends on the order in which a tier looks.
    return {scale, 1.0f / scale, __builtin_nearbyintf(-low * rule.clip / scale) + 0.0f};
}

inline Grid grid_of(Range range, const qexp::GridRule& rule) {
    return rule.symmetric ? symmetric_grid(range, rule) : asymmetric_grid(range, rule);
}

// Codes cannot say NaN: a group that is not finite is stored as NaN (0 - 0).
inline bool storable(const Grid& grid) { return (to_bits(grid.scale) & 0x7FFFFFFFu) < kInfBits; }

}  // namespace
