// The ops of fuzz.h that the solvers use: second moments and column sweeps.
#include <cfloat>
#include <cmath>
#include <limits>

#include "fuzz.h"
#include "gram.h"
#include "sweep.h"

namespace qexp::fuzz {
namespace {

// The tiers add in float32, in chunks of 512 steps, with or without fma: as far apart as rounding allows. The one that
// multiplies pairs of bf16 counts subnormals as zero.
bool close(const Array& x, int64_t tokens, int64_t columns, size_t place, double start, double want, double got) {
    const int64_t i = static_cast<int64_t>(place) / columns, j = static_cast<int64_t>(place) % columns;
    double magnitude = 0, lost = 0;
    for (int64_t t = 0; t < tokens; ++t) {
        const double a = x.value(static_cast<size_t>(t * columns + i)), b = x.value(static_cast<size_t>(t * columns + j));
        if (std::isnan(a) || std::isnan(b)) return false;  // and both must say so
        const double least = std::min(std::fabs(a), std::fabs(b));
        magnitude += std::fabs(a * b);
        lost += least < static_cast<double>(FLT_MIN) ? std::fabs(a * b) + 2.0 * FLT_MIN : 2.0 * FLT_MIN;
    }
    if (!(magnitude < 1e38)) return true;
    const auto chain = static_cast<double>(std::min<int64_t>(tokens, 2 * kGramSteps) + 2);
    return std::fabs(got - want) <= chain * static_cast<double>(FLT_EPSILON) * magnitude + lost + 1e-14 * std::fabs(start);
}

}  // namespace

void second_moment(Call& call, Input& input) {
    const int64_t columns = input.number(1, 70), most = (1 << 18) / (columns * columns);
    const int64_t tokens = std::min(most, input.one_in(4) ? input.number(500, 1100) : input.number(0, 40));
    const bool wide = input.flag();
    const Array x("x", wide ? Kind::fp32 : Kind::bf16, tokens * columns, call.at_end);
    const Array sum("sum", Kind::fp64, columns * columns, call.at_end), start("start", Kind::fp64, columns * columns, true);
    Values values(input);
    x.fill(values);
    if (input.flag()) x.splice(input);
    for (size_t i = 0; i < start.count(); ++i) start.set(i, static_cast<float>(values.bits() % 2001) - 1000.0f);
    describe(call, "tokens=%d columns=%d wide=%d", static_cast<int>(tokens), static_cast<int>(columns), wide);
    compare(
        call, {&sum},
        [&](ParallelFor loop) {
            std::memcpy(sum.as(), start.as(), start.bytes());
            add_gram(x.as(), wide ? GramInput::fp32 : GramInput::bf16, tokens, columns, sum.as<double>(), loop);
        },
        [&](size_t i, double want, double got) { return close(x, tokens, columns, i, start.value(i), want, got); });
    for (size_t i = 0; i < sum.count(); ++i) {
        const auto width = static_cast<size_t>(columns);
        if (i % width < i / width && sum.bits(i) != start.bits(i)) fail(call, "wrote below the diagonal, at %zu", i);
    }
}

void column_sweep(Call& call, Input& input) {
    const int64_t columns = input.number(1, 32), rows = input.one_in(4) ? input.number(120, 270) : input.number(1, 40);
    const int64_t stride = rows + (input.flag() ? 0 : input.number(0, 20)), wide = columns + input.number(0, 3);
    const float top = input.pick({1.0f, 3.0f, 15.0f, 255.0f});
    const Array target("target", Kind::fp32, columns * stride, call.at_end);
    const Array error("error", Kind::fp32, columns * stride, call.at_end);
    const Array codes("codes", Kind::byte, columns * rows, call.at_end);
    const Array scale("scale", Kind::fp32, columns * rows, call.at_end);
    const Array zero("zero", Kind::fp32, columns * rows, call.at_end);
    const Array mix("mix", Kind::fp32, columns * wide, call.at_end);
    const Array weight("weight", Kind::fp32, columns * stride, true);
    Values values(input), others(input);
    weight.fill(values);
    scale.fill(others);
    mix.fill(others);
    for (size_t i = 0; i < zero.count(); ++i) {
        zero.set(i, static_cast<float>(values.bits() % (static_cast<unsigned>(top) + 1)));
    }
    describe(call, "columns=%d rows=%d stride=%d top=%g", static_cast<int>(columns), static_cast<int>(rows),
             static_cast<int>(stride), static_cast<double>(top));
    compare(call, {&codes, &target, &error}, [&](ParallelFor loop) {
        for (const Array* array : {&target, &error}) std::memcpy(array->as(), weight.as(), weight.bytes());
        sweep_columns({target.as<float>(), error.as<float>(), mix.as<float>(), scale.as<float>(), zero.as<float>(),
                       codes.as<uint8_t>(), columns, rows, stride, wide, top},
                      loop);
    });
}

}  // namespace qexp::fuzz
