// The vector tiers of codes.h, written once over the vectors V; Narrower serves the shapes that V does not divide.
#pragma once

#include "codes.h"
#include "codes_grid.h"

namespace {

using qexp::DequantizeTask;
using qexp::FakeQuantizeTask;
using qexp::GridRule;
using qexp::QuantizeTask;

template <class V, const qexp::CodesKernels& Narrower>
struct CodesRows {
    using F = typename V::F;
    using I = typename V::I;
    using Pair = typename V::Pair;
    static constexpr int kPair = 2 * V::lanes;

    // The range of count elements. Comparisons drop NaN, so the largest magnitude is watched beside them.
    template <typename T>
    static Range range_of(const T* x, int64_t count) {
        F low = V::set(from_bits(kInfBits)), high = V::set(-from_bits(kInfBits));
        I most = V::izero();
        for (int64_t i = 0; i < count; i += kPair) {
            const Pair v = V::load_pair(x + i);
            low = V::min(V::min(v.even, v.odd), low);
            high = V::max(V::max(v.even, v.odd), high);
            most = V::umax(most, V::umax(V::magnitude(v.even), V::magnitude(v.odd)));
        }
        const float nan = from_bits(kNanBits);
        if (V::reduce_umax(most) > kInfBits) return {nan, nan};
        return {V::reduce_min(low), V::reduce_max(high)};
    }

    struct Levels {
        F inverse, zero, low, high;
    };

    static inline __attribute__((always_inline)) F clamp(F v, const Levels& l) {
        return V::min(l.high, V::max(l.low, v));  // NaN stays
    }

    template <int Bits, typename T>
    static void encode(const T* x, int64_t count, const Grid& grid, uint8_t* packed) {
        const Levels l{V::set(grid.inverse), V::set(grid.zero), V::set(0.0f), V::set((1 << Bits) - 1)};
        const auto code = [&](F v) { return V::to_int(clamp(V::add(V::round(V::mul(v, l.inverse)), l.zero), l)); };
        for (int64_t i = 0; i < count; i += kPair) {
            const Pair v = V::load_pair(x + i);
            V::template store_codes<Bits>(packed + i * Bits / 8, code(v.even), code(v.odd));
        }
    }

    template <int Bits, typename T>
    static void quantize_rows(const QuantizeTask& task, int64_t begin, int64_t end) {
        const int64_t scales = task.n / task.group, bytes = task.group * Bits / 8;
        for (int64_t r = begin; r < end; ++r) {
            const T* x = static_cast<const T*>(task.x) + r * task.row_stride;
            for (int64_t s = r * scales; s < (r + 1) * scales; ++s, x += task.group) {
                const Grid grid = grid_of(range_of(x, task.group), task.rule);
                const bool good = storable(grid);
                task.scale[s] = good ? grid.scale : from_bits(kNanBits);
                task.zero[s] = good ? grid.zero : 0.0f;
                uint8_t* packed = task.packed + s * bytes;
                if (good) {
                    encode<Bits>(x, task.group, grid, packed);
                } else {
                    for (int64_t i = 0; i < bytes; ++i) packed[i] = 0;
                }
            }
        }
    }

    template <int Bits, typename T>
    static void dequantize_rows(const DequantizeTask& task, int64_t begin, int64_t end) {
        const int64_t scales = task.n / task.group, bytes = task.group * Bits / 8;
        for (int64_t s = begin * scales; s < end * scales; ++s) {
            const F scale = V::set(task.scale[s]), zero = V::set(task.zero[s]);
            const uint8_t* packed = task.packed + s * bytes;
            T* y = static_cast<T*>(task.y) + s * task.group;
            const auto value = [&](I code) { return V::mul(V::sub(V::to_float(code), zero), scale); };
            for (int64_t i = 0; i < task.group; i += kPair) {
                I even, odd;
                V::template load_codes<Bits>(packed + i * Bits / 8, even, odd);
                V::store_pair(y + i, {value(even), value(odd)});
            }
        }
    }

    // A symmetric grid is centred: its zero point never enters and -0 stays -0.
    template <bool Symmetric, typename T>
    static void fake(const T* x, int64_t count, const Grid& grid, int bits, T* y) {
        const float top = static_cast<float>((1 << bits) - 1);
        const Levels l{V::set(grid.inverse), V::set(grid.zero), V::set(Symmetric ? -grid.zero : 0.0f),
                       V::set(Symmetric ? grid.zero - 1.0f : top)};
        const F scale = V::set(grid.scale);
        const auto value = [&](F v) {
            const F level = V::round(V::mul(v, l.inverse));
            if constexpr (Symmetric) return V::mul(clamp(level, l), scale);
            return V::mul(V::sub(clamp(V::add(level, l.zero), l), l.zero), scale);
        };
        for (int64_t i = 0; i < count; i += kPair) {
            const Pair v = V::load_pair(x + i);
            V::store_pair(y + i, {value(v.even), value(v.odd)});
        }
    }

    template <typename T>
    static void fake_rows(const FakeQuantizeTask& task, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const T* x = static_cast<const T*>(task.x) + r * task.row_stride;
            T* y = static_cast<T*>(task.y) + r * task.n;
            for (int64_t g = 0; g < task.n; g += task.group) {
                const Grid grid = grid_of(range_of(x + g, task.group), task.rule);
                if (task.rule.symmetric) {
                    fake<true>(x + g, task.group, grid, task.rule.bits, y + g);
                } else {
                    fake<false>(x + g, task.group, grid, task.rule.bits, y + g);
                }
            }
        }
    }

    // Calls body(T{}) for the element type.
    template <typename Body>
    static void typed(qexp::Dtype dtype, Body&& body) {
        switch (dtype) {
            case qexp::Dtype::bf16:
                return body(Bf16{});
            case qexp::Dtype::fp16:
                return body(Fp16{});
            case qexp::Dtype::fp32:
                return body(0.0f);
        }
    }

    static void quantize(const QuantizeTask& task, int64_t begin, int64_t end) {
        if (task.group % kPair != 0) return Narrower.quantize(task, begin, end);
        typed(task.dtype, [&](auto element) {
            using T = decltype(element);
            if (task.rule.bits == 2) return quantize_rows<2, T>(task, begin, end);
            if (task.rule.bits == 4) return quantize_rows<4, T>(task, begin, end);
            return quantize_rows<8, T>(task, begin, end);
        });
    }

    static void dequantize(const DequantizeTask& task, int64_t begin, int64_t end) {
        if (task.group % kPair != 0) return Narrower.dequantize(task, begin, end);
        typed(task.dtype, [&](auto element) {
            using T = decltype(element);
            if (task.bits == 2) return dequantize_rows<2, T>(task, begin, end);
            if (task.bits == 4) return dequantize_rows<4, T>(task, begin, end);
            return dequantize_rows<8, T>(task, begin, end);
        });
    }

    static void fake_quantize(const FakeQuantizeTask& task, int64_t begin, int64_t end) {
        if (task.group % kPair != 0) return Narrower.fake_quantize(task, begin, end);
        typed(task.dtype, [&](auto element) { fake_rows<decltype(element)>(task, begin, end); });
    }
};

}  // namespace
