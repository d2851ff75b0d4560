// Plain C++: any machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "float16.h"

namespace qexp {
namespace {

// One block of columns as arrays. Sums wrap modulo 2^32 like the vector instructions, hence unsigned.
struct Scalar {
    static constexpr int kLanes = 16;
    static constexpr bool kMadd = false;
    static constexpr int kDirectRows = 2, kDirectBlocksFew = 1, kDirectBlocksMany = 1;
    static constexpr int kPanelRows = 2, kPanelBlocks = 1;
    static constexpr int kFloatRows = 2, kFloatBlocksFew = 1, kFloatBlocksMany = 1;
    struct Bytes {
        uint8_t v[64];
    };
    struct Int {
        uint32_t v[16];
    };
    struct Real {
        float v[16];
    };
    using Element = float;  // of float activations

    template <class T, class F>
    static T each(F f) {
        T out;
        for (int i = 0; i < static_cast<int>(sizeof out.v / sizeof out.v[0]); ++i) out.v[i] = f(i);
        return out;
    }

    static Bytes load_bytes(const uint8_t* p) {
        return each<Bytes>([&](int i) { return p[i]; });
    }
    static void store_bytes(uint8_t* p, const Bytes& v) { std::memcpy(p, v.v, sizeof v.v); }
    static Bytes low_nibbles(const Bytes& v) {
        return each<Bytes>([&](int i) { return static_cast<uint8_t>(v.v[i] & 15); });
    }
    static Bytes high_nibbles(const Bytes& v) {
        return each<Bytes>([&](int i) { return static_cast<uint8_t>(v.v[i] >> 4); });
    }
    static Bytes broadcast4(const int8_t* p) {
        return each<Bytes>([&](int i) { return static_cast<uint8_t>(p[i % 4]); });
    }
    static void dot(Int& acc, const Bytes& w, const Bytes& a) {
        for (int c = 0; c < 16; ++c)
            for (int j = 0; j < 4; ++j) {
                acc.v[c] += static_cast<uint32_t>(w.v[4 * c + j] * static_cast<int8_t>(a.v[4 * c + j]));
            }
    }
    static Int broadcast_int(int32_t v) {
        return each<Int>([&](int) { return static_cast<uint32_t>(v); });
    }
    static Int load_ints(const int32_t* p) {
        return each<Int>([&](int i) { return static_cast<uint32_t>(p[i]); });
    }
    static void store_ints(int32_t* p, const Int& v) { std::memcpy(p, v.v, sizeof v.v); }
    static Real to_real(const Int& v) {
        return each<Real>([&](int i) { return static_cast<float>(static_cast<int32_t>(v.v[i])); });
    }
    static Real broadcast_real(float v) {
        return each<Real>([&](int) { return v; });
    }
    static Real load_reals(const float* p) {
        return each<Real>([&](int i) { return p[i]; });
    }
    static void store_reals(float* p, const Real& v) { std::memcpy(p, v.v, sizeof v.v); }
    static Real fma(const Real& a, const Real& b, const Real& c) {
        return each<Real>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
    }
    static Real minus_product(const Real& a, const Real& b, const Real& c) {
        return each<Real>([&](int i) { return std::fma(-a.v[i], b.v[i], c.v[i]); });
    }
    static Real nibble_value(const Bytes& v, int i) {
        return each<Real>([&](int c) {
            return static_cast<float>(((v.v[4 * c + i / 2] >> (4 * (i % 2))) & 15) - 8);
        });
    }
    static void store_bf16(uint16_t* p, const Real& v) {
        for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(v.v[i]);
    }
    static void store_fp16(uint16_t* p, const Real& v) {
        for (int i = 0; i < 16; ++i) p[i] = float_to_fp16(v.v[i]);
    }
};

}  // namespace
}  // namespace qexp
