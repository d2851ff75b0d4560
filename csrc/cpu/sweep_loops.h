// The loops of sweep.h, compiled once per instruction set: plain enough for the compiler to vectorise them.
#pragma once

#include "sweep.h"

namespace {

// Half to even for |x| < 2^22, by letting the addition round: the same result in every tier, and it vectorises.
inline float round_even(float x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23
    return (x + magic) - magic;
}

inline float clamped(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

inline void round_column(const qexp::Sweep& s, int64_t k, int64_t begin, int64_t end) {
    const float* target = s.target + k * s.stride;
    float* error = s.error + k * s.stride;
    const float *scale = s.scale + k * s.rows, *zero = s.zero + k * s.rows;
    uint8_t* codes = s.codes + k * s.rows;
    const float far = 2.0f * s.top + 2.0f;  // beyond it every zero point clamps to the same end
    for (int64_t r = begin; r < end; ++r) {
        const float code = clamped(round_even(clamped(target[r] / scale[r], -far, far)) + zero[r], 0.0f, s.top);
        codes[r] = static_cast<uint8_t>(code > 0.0f ? code : 0.0f);  // 0 for NaN, whose conversion is undefined
        error[r] -= (code - zero[r]) * scale[r];
    }
}

inline void feed_forward(const qexp::Sweep& s, int64_t from, int64_t to, int64_t begin, int64_t end) {
    const float share = s.mix[from * s.mix_stride + to];
    const float* error = s.error + from * s.stride;
    float* target = s.target + to * s.stride;
    for (int64_t r = begin; r < end; ++r) target[r] += share * error[r];
}

inline void sweep_rows(const qexp::Sweep& s, int64_t begin, int64_t end) {
    for (int64_t k = 0; k < s.columns; ++k) {
        round_column(s, k, begin, end);
        for (int64_t later = k + 1; later < s.columns; ++later) feed_forward(s, k, later, begin, end);
    }
}

}  // namespace
