// The ops of fuzz.h that work row by row: rotation, its fusion with quantization, codes of keys and values.
#include <cmath>

#include "codes.h"
#include "fuzz.h"
#include "hadamard.h"

namespace qexp::fuzz {
namespace {

constexpr int64_t kMost = 8192;  // columns of a row: enough for every pass of the widest tier

Kind kind_of(Dtype dtype) {
    return dtype == Dtype::fp32 ? Kind::fp32 : (dtype == Dtype::bf16 ? Kind::bf16 : Kind::fp16);
}

// A divisor of n, any with the same chance.
int64_t divisor(Input& input, int64_t n) {
    std::vector<int64_t> all;
    for (int64_t d = 1; d * d <= n; ++d) {
        if (n % d != 0) continue;
        all.push_back(d);
        if (d * d != n) all.push_back(n / d);
    }
    return all[static_cast<size_t>(input.number(0, static_cast<int64_t>(all.size()) - 1))];
}

// Rows of x, some elements apart.
struct Rows {
    int64_t rows, n, stride;
    Dtype dtype;
    Array x;

    Rows(const Call& call, Input& input, int64_t columns)
        : rows(input.number(1, 4)), n(columns), stride(n + (input.flag() ? 0 : input.number(0, 40))),
          dtype(input.pick({Dtype::fp32, Dtype::bf16, Dtype::fp16})),
          x("x", kind_of(dtype), (rows - 1) * stride + n, call.at_end) {}

    void fill(Input& input) const {
        Values values(input);
        x.fill(values);
        if (input.flag()) x.splice(input);
    }
};

// A map of n columns, with signs that need not be a Hadamard matrix.
struct Map {
    Rotation rotation;
    Picks picks;
    int64_t n;

    explicit Map(Input& input) {
        rotation.order = input.flag() ? 1 : input.pick<int64_t>({2, 3, 5, 7, 12, 20, 28, 36, 65, 66, 130, 172});
        rotation.power = static_cast<int>(input.number(0, 13));
        while (rotation.width() > kMost) --rotation.power;
        n = rotation.width() * input.number(1, std::min<int64_t>(5, kMost / rotation.width()));
        if (rotation.order == 1) return;
        Values values(input);
        std::vector<int8_t> signs(static_cast<size_t>(rotation.order * rotation.order));
        for (int8_t& sign : signs) sign = (values.bits() & 1) != 0 ? 1 : -1;
        picks = picks_of(signs.data(), rotation.order);
        rotation.picks = picks.picks.data();
        rotation.positives = picks.positives.data();
    }
};

float clip_of(Input& input) { return input.pick({1.0f, 1.0f, 0.99999994f, 0.9f, 0.5f, 0.01f, 1e-6f, 1e-30f, 1e-45f}); }

void quantize(const Call& call, const Rows& rows, const GridRule& rule, int64_t group) {
    const Array packed("packed", Kind::byte, rows.rows * rows.n * rule.bits / 8, call.at_end);
    const Array scale("scale", Kind::fp32, rows.rows * rows.n / group, call.at_end);
    const Array zero("zero", Kind::fp32, rows.rows * rows.n / group, call.at_end);
    compare(call, {&packed, &scale, &zero}, [&](ParallelFor loop) {
        quantize_codes({rows.x.as(), rows.stride, rows.rows, rows.n, rows.dtype, rule, group, packed.as<uint8_t>(),
                        scale.as<float>(), zero.as<float>()},
                       loop);
    });
}

void dequantize(const Call& call, Input& input, const Rows& rows, int bits, int64_t group) {
    const Array packed("packed", Kind::byte, rows.rows * rows.n * bits / 8, call.at_end);
    const Array scale("scale", Kind::fp32, rows.rows * rows.n / group, call.at_end);
    const Array zero("zero", Kind::fp32, rows.rows * rows.n / group, call.at_end);
    const Array y("y", kind_of(rows.dtype), rows.rows * rows.n, call.at_end);
    Values values(input);
    for (const Array* array : {&packed, &scale, &zero}) array->fill(values);
    compare(call, {&y}, [&](ParallelFor loop) {
        dequantize_codes({packed.as<uint8_t>(), scale.as<float>(), zero.as<float>(), rows.rows, rows.n, bits, group,
                          rows.dtype, y.as()},
                         loop);
    });
}

void round_trip(const Call& call, const Rows& rows, const GridRule& rule, int64_t group) {
    const Array y("y", kind_of(rows.dtype), rows.rows * rows.n, call.at_end);
    compare(call, {&y}, [&](ParallelFor loop) {
        fake_quantize({rows.x.as(), rows.stride, rows.rows, rows.n, rows.dtype, rule, group, y.as()}, loop);
    });
}

}  // namespace

void hadamard_rows(Call& call, Input& input) {
    const Map map(input);
    const Rows rows(call, input, map.n);
    const auto norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(map.rotation.width())));
    const float scale = input.flag() ? norm : Values(input).next();
    rows.fill(input);
    describe(call, "order=%d power=%d rows=%d stride=%d n=%d dtype=%d scale=%g", static_cast<int>(map.rotation.order),
             map.rotation.power, static_cast<int>(rows.rows), static_cast<int>(rows.stride), static_cast<int>(rows.n),
             static_cast<int>(rows.dtype), static_cast<double>(scale));
    const Array y("y", kind_of(rows.dtype), rows.rows * rows.n, call.at_end);
    compare(call, {&y}, [&](ParallelFor loop) {
        hadamard({rows.x.as(), y.as(), rows.stride, rows.rows, rows.n, rows.dtype, map.rotation, scale}, loop);
    });
}

void had_quant_rows(Call& call, Input& input) {
    const Map map(input);
    const Rows rows(call, input, map.n);
    const Rotation rotation = input.one_in(4) ? Rotation{} : map.rotation;
    const auto norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(rotation.width())));
    const int bits = input.flag() ? 4 : 8;
    const bool packed = bits == 4 && rows.n % 2 == 0 && input.flag();
    const int64_t group = input.flag() ? rows.n : divisor(input, rows.n);
    const int64_t sum_group = input.flag() ? rows.n : divisor(input, rows.n);
    const float clip = clip_of(input);
    rows.fill(input);
    describe(call, "order=%d power=%d rows=%d stride=%d n=%d dtype=%d bits=%d packed=%d group=%d sum_group=%d clip=%g",
             static_cast<int>(rotation.order), rotation.power, static_cast<int>(rows.rows),
             static_cast<int>(rows.stride), static_cast<int>(rows.n), static_cast<int>(rows.dtype), bits, packed,
             static_cast<int>(group), static_cast<int>(sum_group), static_cast<double>(clip));
    const Array q("q", Kind::byte, rows.rows * rows.n / (packed ? 2 : 1), call.at_end);
    const Array scale("scale", Kind::fp32, rows.rows * (rows.n / group), call.at_end);
    const Array sums("sums", Kind::int32, rows.rows * (rows.n / sum_group), call.at_end);
    compare(call, {&q, &scale, &sums}, [&](ParallelFor loop) {
        had_quant({rows.x.as(), rows.stride, rows.rows, rows.n, rows.dtype, rotation, norm, clip, bits, packed, group,
                   sum_group, q.as<uint8_t>(), scale.as<float>(), sums.as<int32_t>()},
                  loop);
    });
}

void code_rows(Call& call, Input& input) {
    const int64_t what = input.number(0, 2);  // quantize, dequantize, both in one
    const bool any = what == 2 && input.flag();  // else a width that the vectors of most tiers divide
    const Rows rows(call, input, any ? input.number(1, 300) : (input.flag() ? 32 : 8) * input.number(1, 16));
    const int bits = what == 2 ? static_cast<int>(input.number(2, 8)) : input.pick({2, 4, 8});
    const int64_t group = input.flag() ? rows.n : divisor(input, rows.n);
    const GridRule rule{bits, input.flag(), what == 2 && input.flag(), clip_of(input), input.flag()};
    rows.fill(input);
    describe(call, "part %d rows=%d stride=%d n=%d dtype=%d bits=%d group=%d symmetric=%d widen=%d clip=%g",
             static_cast<int>(what), static_cast<int>(rows.rows), static_cast<int>(rows.stride),
             static_cast<int>(rows.n), static_cast<int>(rows.dtype), bits, static_cast<int>(group), rule.symmetric,
             rule.widen, static_cast<double>(rule.clip));
    if (what == 0) quantize(call, rows, rule, group);
    if (what == 1) dequantize(call, input, rows, bits, group);
    if (what == 2) round_trip(call, rows, rule, group);
}

}  // namespace qexp::fuzz
