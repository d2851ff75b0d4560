// Second moments and column sweeps without torch: every tier against doubles and against the plain tier, between guard
// pages, with loops that split as finely as allowed and with threads. Built and run by tests/unit/test_gram.py, also
// with the sanitizers.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "dispatch.h"
#include "float16.h"
#include "gram.h"
#include "guarded.h"
#include "sweep.h"

namespace {

using namespace qexp;

int failures = 0, cases = 0;

void check(bool condition, const char* what, int64_t rows, int64_t columns, Isa tier) {
    ++cases;
    if (condition) return;
    std::printf("%s: %lld x %lld, tier %s\n", what, static_cast<long long>(rows), static_cast<long long>(columns),
                isa_name(tier));
    if (++failures > 20) std::exit(1);
}

template <typename Body>
void on_every_tier(Body body) {
    for (const Isa tier : {Isa::scalar, Isa::avx2, Isa::avxvnni, Isa::avx512bw, Isa::avx512vnni}) {
        if (!isa_supported(tier)) continue;
        force_isa(isa_name(tier));
        body(tier);
    }
    force_isa(nullptr);
}

constexpr ParallelFor kLoops[] = {serial, one_by_one, threads};

template <typename T>
std::vector<T> copy_of(const Guarded<T>& memory) {
    return {memory.get(), memory.get() + memory.size()};
}

// Sums on top of what is there; what lies below the diagonal is a NaN before and after.
void moments(int64_t tokens, int64_t columns, GramInput kind, bool at_end, std::mt19937& random) {
    const size_t size = static_cast<size_t>(tokens * columns);
    Guarded<float> wide(kind == GramInput::fp32 ? size : 0, at_end);
    Guarded<uint16_t> half(kind == GramInput::bf16 ? size : 0, at_end);
    std::vector<double> exact(static_cast<size_t>(columns * columns)), energy(static_cast<size_t>(columns));
    const auto value = [&](int64_t t, int64_t c) {
        const size_t i = static_cast<size_t>(t * columns + c);
        return static_cast<double>(kind == GramInput::fp32 ? wide[i] : bf16_to_float(half[i]));
    };
    for (size_t i = 0; i < size; ++i) {
        if (kind == GramInput::fp32) wide[i] = (static_cast<float>(random() % 20001) - 10000.0f) / 1000.0f;
        if (kind == GramInput::bf16) half[i] = static_cast<uint16_t>((random() & 0x83FFu) | 0x3C00u);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < columns; ++i) {
            energy[static_cast<size_t>(i)] += value(t, i) * value(t, i);
            for (int64_t j = i; j < columns; ++j) exact[static_cast<size_t>(i * columns + j)] += value(t, i) * value(t, j);
        }
    }
    const void* x = kind == GramInput::fp32 ? static_cast<const void*>(wide.get()) : half.get();
    on_every_tier([&](Isa tier) {
        std::vector<double> first;
        for (const ParallelFor loop : kLoops) {
            Guarded<double> sum(static_cast<size_t>(columns * columns), at_end);
            for (int64_t i = 0; i < columns; ++i) {
                for (int64_t j = 0; j < columns; ++j) {
                    sum[static_cast<size_t>(i * columns + j)] = j < i ? std::numeric_limits<double>::quiet_NaN() : 5.0;
                }
            }
            add_gram(x, kind, tokens, columns, sum.get(), loop);
            bool close = true, untouched = true;
            for (int64_t i = 0; i < columns; ++i) {
                for (int64_t j = 0; j < columns; ++j) {
                    const size_t at = static_cast<size_t>(i * columns + j);
                    const double scale = std::sqrt(energy[static_cast<size_t>(i)] * energy[static_cast<size_t>(j)]);
                    if (j < i) untouched = untouched && std::isnan(sum[at]);
                    if (j >= i) close = close && std::fabs(sum[at] - 5.0 - exact[at]) <= 1e-5 * scale + 1e-12;
                }
            }
            check(close, "gram is far from the sums", tokens, columns, tier);
            check(untouched, "gram writes below the diagonal", tokens, columns, tier);
            const std::vector<double> found = copy_of(sum);
            if (first.empty()) first = found;
            check(std::memcmp(first.data(), found.data(), found.size() * sizeof(double)) == 0, "gram depends on the loop",
                  tokens, columns, tier);
        }
    });
}

struct Swept {
    std::vector<float> target, error;
    std::vector<uint8_t> codes;
    bool operator==(const Swept& other) const {
        return target == other.target && error == other.error && codes == other.codes;
    }
};

void sweeps(int64_t rows, int64_t columns, bool at_end, std::mt19937& random) {
    const auto count = static_cast<size_t>(rows * columns);
    const auto uniform = [&] { return (static_cast<float>(random() % 2001) - 1000.0f) / 1000.0f; };
    std::vector<float> start(count), scales(count), zeros(count);
    Guarded<float> mix(static_cast<size_t>(columns * columns), at_end);
    for (size_t i = 0; i < count; ++i) {
        start[i] = uniform();
        scales[i] = 0.05f + std::fabs(uniform());
        zeros[i] = static_cast<float>(random() % 16);
    }
    for (size_t i = 0; i < mix.size(); ++i) mix[i] = uniform();
    Swept expected;
    on_every_tier([&](Isa tier) {
        for (const ParallelFor loop : kLoops) {
            Guarded<float> target(count, at_end), error(count, at_end), scale(count, at_end), zero(count, at_end);
            Guarded<uint8_t> codes(count, at_end);
            for (size_t i = 0; i < count; ++i) {
                target[i] = error[i] = start[i];
                scale[i] = scales[i];
                zero[i] = zeros[i];
            }
            sweep_columns({target.get(), error.get(), mix.get(), scale.get(), zero.get(), codes.get(), columns, rows, rows,
                           columns, 15.0f}, loop);
            const Swept found{copy_of(target), copy_of(error), copy_of(codes)};
            if (expected.codes.empty()) expected = found;
            check(found == expected, "sweep differs", rows, columns, tier);
            for (size_t i = 0; i < count; ++i) {
                const float decoded = (static_cast<float>(codes[i]) - zeros[i]) * scales[i];
                check(codes[i] <= 15 && std::fabs(error[i] - (start[i] - decoded)) <= 1e-5f * (1 + std::fabs(decoded)),
                      "error is not weight - rounded", rows, columns, tier);
            }
        }
    });
}

}  // namespace

int main() {
    std::mt19937 random(11);
    for (const bool at_end : {true, false}) {
        for (const GramInput kind : {GramInput::fp32, GramInput::bf16}) {
            for (const int64_t tokens : {0, 1, 2, 15, 129, 513, 1030}) {
                for (const int64_t columns : {1, 15, 16, 17, 40, 97}) moments(tokens, columns, kind, at_end, random);
            }
        }
        for (const int64_t rows : {1, 7, 16, 127, 128, 129, 400}) {
            for (const int64_t columns : {1, 2, 31, 32}) sweeps(rows, columns, at_end, random);
        }
    }
    std::printf("%d comparisons, %s\n", cases, failures ? "FAILED" : "all well");
    return failures ? 1 : 0;
}
