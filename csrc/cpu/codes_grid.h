// From the range of a group to its grid, in the operations and the order of qexp/kernels/quantize.py.
#pragma once

#include "codes.h"
#include "float16.h"
#include "hadamard_scale.h"

namespace {

constexpr float kEpsilon = 1.1920929e-07f;
constexpr float kHalfEpsilon = 9.765625e-04f, kHalfTiny = 5.9604645e-08f;  // of float16: 2^-10, 2^-24

struct Range {
    float low, high;  // NaN if a value was
};

struct Grid {
    float scale, inverse, zero;  // code = clamp(round(x inverse) + zero), x^ = scale (code - zero)
};

inline float larger(float a, float b) { return a < b ? b : a; }  // a where b is NaN

inline float as_kept(float scale, const qexp::GridRule& rule) {
    return rule.half ? fp16_to_float(float_to_fp16(scale)) : scale;
}

inline Grid symmetric_grid(Range range, const qexp::GridRule& rule) {
    const float top = static_cast<float>((1 << (rule.bits - 1)) - 1);
    const float raw = larger(-range.low, range.high) * rule.clip / top;
    const float tiny = rule.half ? kHalfTiny : kTiny;
    const float scale = as_kept(raw < tiny ? tiny : raw, rule);
    return {scale, 1.0f / scale, top + 1.0f};
}

inline Grid asymmetric_grid(Range range, const qexp::GridRule& rule) {
    const float low = rule.widen && range.low > 0.0f ? 0.0f : range.low;
    const float high = rule.widen && range.high < 0.0f ? 0.0f : range.high;
    const float top = static_cast<float>((1 << rule.bits) - 1);
    // So that a constant row c comes out as c, to the accuracy of its parameters; float16 then holds zero exactly.
    const float floor = larger(-low, high) * (rule.half ? kHalfEpsilon : kEpsilon) + (rule.half ? kHalfTiny : kTiny);
    const float scale = as_kept(larger((high - low) * rule.clip / top, floor), rule);
    // + 0 makes 0 of -0: which of two zeros is the least of a group depends on the order in which a tier looks.
    return {scale, 1.0f / scale, __builtin_nearbyintf(-low * rule.clip / scale) + 0.0f};
}

inline Grid grid_of(Range range, const qexp::GridRule& rule) {
    return rule.symmetric ? symmetric_grid(range, rule) : asymmetric_grid(range, rule);
}

// Codes cannot say NaN: a group that is not finite is stored as NaN (0 - 0).
inline bool storable(const Grid& grid) { return (to_bits(grid.scale) & 0x7FFFFFFFu) < kInfBits; }

}  // namespace
