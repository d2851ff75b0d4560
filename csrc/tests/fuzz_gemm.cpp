// The ops of fuzz.h around 4-bit weights: nibbles, the layout p16k8, products with codes and with floats.
#include <cfloat>
#include <cmath>

#include "fuzz.h"
#include "gemm.h"
#include "int4.h"
#include "p16k8.h"

namespace qexp::fuzz {
namespace {

constexpr int64_t kMostProducts = 1 << 17;  // the plain tier is slow, and slower with sanitizers

Kind kind_of(Float dtype) {
    return dtype == Float::fp32 ? Kind::fp32 : (dtype == Float::bf16 ? Kind::bf16 : Kind::fp16);
}

// Bytes of one value or of any: the extremes of codes need company to show.
void fill_bytes(const Array& array, Input& input) {
    Values values(input);
    array.fill(values);
    if (input.one_in(4)) array.poison(input.pick({0x80, 0x88, 0x7F, 0x77, 0xFF}));
    if (input.one_in(4)) array.splice(input);
}

struct Shape {
    int64_t m, n, k, group;

    explicit Shape(Input& input)
        : m(input.one_in(12) ? input.number(250, 262) : input.number(1, 40)), n(input.number(1, 80)),
          group(8 * (input.one_in(8) ? input.number(120, 150) : input.number(0, 20))) {
        const int64_t groups = input.number(1, input.one_in(8) ? 140 : 6);
        k = group ? group * groups : 2 * (input.one_in(8) ? input.number(500, 1300) : input.number(1, 200));
        n = std::clamp<int64_t>(kMostProducts / (m * k), 1, n);
        m = std::clamp<int64_t>(kMostProducts / (n * k), 1, m);
    }
    int64_t groups() const { return group ? k / group : 1; }
    int64_t group_of(int64_t i) const { return group ? i / group : 0; }
};

struct Weight {
    Shape s;
    Array canonical, packed, scale, shift;
    bool shifted;

    Weight(const Call& call, Input& input)
        : s(input), canonical("canonical", Kind::byte, s.n * s.k / 2, call.at_end),
          packed("packed", Kind::byte, p16k8_bytes(s.n, s.k), call.at_end),
          scale("scale", Kind::fp32, column_blocks(s.n) * s.groups() * 16, call.at_end),
          shift("shift", Kind::fp32, column_blocks(s.n) * s.groups() * 16, call.at_end), shifted(input.flag()) {
        fill_bytes(canonical, input);
        Values values(input);
        scale.fill(values);
        shift.fill(values);
        prepack_p16k8(canonical.as<uint8_t>(), s.n, s.k, s.group, packed.as<uint8_t>(), call.loop);
    }
    W4Weight view() const {
        return {packed.as<uint8_t>() + kHeaderBytes, scale.as<float>(), shifted ? shift.as<float>() : nullptr, s.n, s.k,
                s.group};
    }
    int code(int64_t column, int64_t i) const {
        const int nibble = canonical.as<uint8_t>()[(column * s.k + i) / 2] >> (i % 2 * 4) & 15;
        return nibble < 8 ? nibble : nibble - 16;
    }
    int64_t scale_at(int64_t column, int64_t g) const { return (column / 16 * s.groups() + g) * 16 + column % 16; }
};

void describe_shape(Call& call, const Shape& s, const char* words, int64_t stride, int dtype, bool shifted) {
    describe(call, "%s m=%d n=%d k=%d group=%d stride=%d dtype=%d shifted=%d", words, static_cast<int>(s.m),
             static_cast<int>(s.n), static_cast<int>(s.k), static_cast<int>(s.group), static_cast<int>(stride), dtype,
             shifted);
}

// Where the layout puts every code, by the formula of p16k8.h.
void check_layout(const Call& call, const Weight& w) {
    const int64_t steps = k_steps(w.s.k);
    for (int64_t column = 0; column < column_blocks(w.s.n) * 16; ++column) {
        for (int64_t i = 0; i < steps * 8; ++i) {
            const NibblePlace place = p16k8_place(column, i, steps);
            const int stored = w.packed.as<uint8_t>()[kHeaderBytes + place.byte] >> place.shift & 15;
            const int want = column < w.s.n && i < w.s.k ? w.code(column, i) + 8 : 8;
            if (stored != want) {
                fail(call, "column %d, k %d is packed as %d, not %d", static_cast<int>(column), static_cast<int>(i),
                     stored, want);
            }
        }
    }
}

// A sum of float products: what it is about, and whether it may be told apart from infinity.
struct Sum {
    double magnitude = 0, lost = 0;  // of all terms; of those that have a subnormal factor, or are subnormal
    bool nan = false;
};

Sum terms(const Weight& w, const Array& x, int64_t row_start, int64_t column) {
    Sum sum;
    for (int64_t i = 0; i < w.s.k; ++i) {
        const auto at = static_cast<size_t>(w.scale_at(column, w.s.group_of(i)));
        const double value = x.value(static_cast<size_t>(row_start + i)), scale = std::fabs(w.scale.value(at));
        const double shift = w.shifted ? std::fabs(w.shift.value(at)) : 0.0;
        const double product = std::fabs(value * w.code(column, i));
        sum.nan = sum.nan || std::isnan(value);
        sum.magnitude += product * std::max(scale, 1.0) + std::fabs(value) * shift;
        sum.lost += (std::fabs(value) < static_cast<double>(FLT_MIN) ? product : 2.0 * FLT_MIN) * scale;
    }
    return sum;
}

// Pairs of bf16 are multiplied by an instruction of its own, which rounds in another order and reads subnormals as zero.
Close bf16_pairs(const Weight& w, const Array& x, int64_t stride) {
    return [&w, &x, stride](size_t i, double want, double got) {
        const int64_t row = static_cast<int64_t>(i) / w.s.n, column = static_cast<int64_t>(i) % w.s.n;
        const Sum sum = terms(w, x, row * stride, column);
        if (sum.nan) return false;  // and both must say so
        if (!(sum.magnitude < 1e37)) return true;
        const double rounding = 4e-3 * std::max(std::fabs(want), std::fabs(got)) + 1e-40;  // kernels.md section 8
        return std::fabs(got - want) <= 2 * rounding + 2e-5 * sum.magnitude + sum.lost;
    };
}

}  // namespace

void nibbles(Call& call, Input& input) {
    const int64_t bytes = input.number(0, 300);
    const Array source("source", Kind::byte, bytes, call.at_end), q("q", Kind::byte, 2 * bytes, call.at_end);
    const Array packed("packed", Kind::byte, bytes, call.at_end);
    describe(call, "%d bytes", static_cast<int>(bytes));
    fill_bytes(source, input);
    unpack_int4(source.as<uint8_t>(), q.as<int8_t>(), bytes, call.loop);
    for (int64_t i = 0; i < 2 * bytes; ++i) {
        if (q.as<int8_t>()[i] < -8 || q.as<int8_t>()[i] > 7) fail(call, "element %d unpacked", static_cast<int>(i));
    }
    if (!pack_int4(q.as<int8_t>(), packed.as<uint8_t>(), 2 * bytes, call.loop)) fail(call, "refused");
    if (bytes != 0 && std::memcmp(source.as(), packed.as(), source.bytes()) != 0) fail(call, "no round trip");
    q.splice(input);
    bool fits = true;
    for (int64_t i = 0; i < 2 * bytes; ++i) fits = fits && q.as<int8_t>()[i] >= -8 && q.as<int8_t>()[i] <= 7;
    if (pack_int4(q.as<int8_t>(), packed.as<uint8_t>(), 2 * bytes, call.loop) != fits) fail(call, "fits is %d", fits);
}

void integer_product(Call& call, Input& input) {
    const Weight w(call, input);
    const int64_t stride = w.s.k + (input.flag() ? 0 : input.number(0, 20));
    const Array a("a", Kind::byte, (w.s.m - 1) * stride + w.s.k, call.at_end);
    const Array out("out", Kind::int32, w.s.m * w.s.n, call.at_end);
    fill_bytes(a, input);
    describe_shape(call, w.s, "integers", stride, 0, false);
    check_layout(call, w);
    compare(call, {&out}, [&](ParallelFor loop) {
        w4a8_i32(a.as<int8_t>(), stride, w.s.m, w.view(), out.as<int32_t>(), loop);
    });
}

void scaled_product(Call& call, Input& input) {
    const Weight w(call, input);
    const bool four = input.flag();
    const int64_t row = four ? w.s.k / 2 : w.s.k, stride = row + (input.flag() ? 0 : input.number(0, 20));
    const auto dtype = input.pick({Float::fp32, Float::bf16, Float::fp16});
    const Array a("a", Kind::byte, (w.s.m - 1) * stride + row, call.at_end);
    const Array scale("a_scale", Kind::fp32, w.s.m, call.at_end), bias("bias", Kind::fp32, w.s.n, call.at_end);
    const Array sums("a_sums", Kind::int32, w.s.m * w.s.groups(), call.at_end);
    const Array out("out", kind_of(dtype), w.s.m * w.s.n, call.at_end);
    fill_bytes(a, input);
    Values values(input);
    for (const Array* array : {&scale, &bias, &sums}) array->fill(values);
    const bool biased = input.flag(), given = input.one_in(4);  // any numbers will do as sums: all tiers take them
    W4A8Call product{a.as(), four, stride, w.s.m, scale.as<float>(), given ? sums.as<int32_t>() : nullptr, w.view(),
                     {biased ? bias.as<float>() : nullptr, out.as(), dtype}};
    describe_shape(call, w.s, four ? "nibbles" : "bytes", stride, static_cast<int>(dtype), w.shifted);
    compare(call, {&out}, [&](ParallelFor loop) { w4a8(product, loop); });
}

void float_product(Call& call, Input& input) {
    const Weight w(call, input);
    const auto dtype = input.pick({Float::fp32, Float::bf16, Float::fp16});
    const int64_t stride = w.s.k + (input.flag() ? 0 : input.number(0, 20));
    const Array x("x", kind_of(dtype), (w.s.m - 1) * stride + w.s.k, call.at_end);
    const Array bias("bias", Kind::fp32, w.s.n, call.at_end), out("out", kind_of(dtype), w.s.m * w.s.n, call.at_end);
    Values values(input);
    for (const Array* array : {&x, &bias}) array->fill(values);
    if (input.flag()) x.splice(input);
    const bool biased = input.flag();
    W4A16Call product{x.as(), dtype, stride, w.s.m, w.view(), {biased ? bias.as<float>() : nullptr, out.as(), dtype}};
    describe_shape(call, w.s, biased ? "floats, bias" : "floats", stride, static_cast<int>(dtype), w.shifted);
    force_isa(isa_name(call.tier));
    const bool pairs = dtype == Float::bf16 && use_avx512bf16();
    compare(call, {&out}, [&](ParallelFor loop) { w4a16(product, loop); }, pairs ? bf16_pairs(w, x, stride) : Close{});
}

}  // namespace qexp::fuzz
