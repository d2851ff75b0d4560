// The CPU core without torch: every tier of this machine against plain loops, between guard pages, into poisoned memory.
//
// Built and run by tests/unit/test_gemm_cpu.py, also with the address and undefined-behaviour sanitizers. Every input
// and output ends where a page without access begins, or begins where one ends, so that a read or write one byte too far
// is a crash; packed weights and scales too, which the kernels may read only inside.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"
#include "floors.h"
#include "gemm.h"
#include "gemm_table.h"
#include "guarded.h"
#include "int4.h"
#include "p16k8.h"

namespace qexp {
const GemmTable& evex_table();  // gemm_evex_avx512vnni.cpp
}

namespace {

using namespace qexp;

int failures = 0;

#define CHECK(condition, ...)                                                 \
    do {                                                                      \
        if (!(condition)) {                                                   \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);       \
            std::printf(__VA_ARGS__);                                         \
            std::printf("\n");                                                \
            if (++failures > 20) std::exit(1);                                \
        }                                                                     \
    } while (false)

// ---- a product and its answer --------------------------------------------------------------------------------------

struct Problem {
    int64_t m, n, k, group, groups;
    bool at_end;
    Guarded<int8_t> q, a;  // plain codes
    Guarded<uint8_t> canonical, packed, nibbles;
    Guarded<float> scale, shift, a_scale, bias, x;
    std::vector<int32_t> integers;  // [m][n][groups]
    std::vector<int32_t> small;     // the same for a >> 4

    Problem(int64_t m_, int64_t n_, int64_t k_, int64_t group_, bool end, unsigned seed);
    double answer(int64_t row, int64_t column, bool four) const;
    W4Weight weight(bool shifted) const {
        return {packed.get() + kHeaderBytes, scale.get(), shifted ? shift.get() : nullptr, n, k, group};
    }
};

size_t size_of(int64_t count) { return static_cast<size_t>(count); }

Problem::Problem(int64_t m_, int64_t n_, int64_t k_, int64_t group_, bool end, unsigned seed)
    : m(m_), n(n_), k(k_), group(group_), groups(group_ ? k_ / group_ : 1), at_end(end), q(size_of(n * k), end),
      a(size_of(m * k), end), canonical(size_of(n * k / 2), end), packed(size_of(p16k8_bytes(n, k)), end),
      nibbles(size_of(m * k / 2), end), scale(size_of(column_blocks(n) * groups * 16), end),
      shift(size_of(column_blocks(n) * groups * 16), end), a_scale(size_of(m), end), bias(size_of(n), end),
      x(size_of(m * k), end), integers(size_of(m * n * groups)), small(size_of(m * n * groups)) {
    std::mt19937 random(seed);
    for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<int8_t>(static_cast<int>(random() % 16) - 8);
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<int8_t>(random());
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(a[i]) / 16.0f;
    for (size_t i = 0; i < a_scale.size(); ++i) a_scale[i] = static_cast<float>(random() % 1000 + 1) / 1000.0f;
    for (size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(random() % 1000) / 100.0f;
    for (size_t i = 0; i < scale.size(); ++i) {
        const bool real = static_cast<int64_t>(i) / (groups * 16) * 16 + static_cast<int64_t>(i) % 16 < n;
        scale[i] = real ? static_cast<float>(random() % 1000 + 1) / 1000.0f : 0.0f;
        shift[i] = real ? scale[i] * static_cast<float>(static_cast<int>(random() % 16) - 8) : 0.0f;
    }
    std::vector<int8_t> a4(a.size());
    for (size_t i = 0; i < a.size(); ++i) a4[i] = static_cast<int8_t>(a[i] >> 4);
    CHECK(pack_int4(q.get(), canonical.get(), n * k, serial), "packing");
    CHECK(pack_int4(a4.data(), nibbles.get(), m * k, serial), "packing");
    prepack_p16k8(canonical.get(), n, k, group, packed.get(), serial);
    for (int64_t row = 0; row < m; ++row)
        for (int64_t column = 0; column < n; ++column)
            for (int64_t i = 0; i < k; ++i) {
                const size_t place = size_of((row * n + column) * groups + (group ? i / group : 0));
                integers[place] += a[size_of(row * k + i)] * q[size_of(column * k + i)];
                small[place] += a4[size_of(row * k + i)] * q[size_of(column * k + i)];
            }
}

double Problem::answer(int64_t row, int64_t column, bool four) const {
    double total = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const size_t s = size_of((column / 16 * groups + g) * 16 + column % 16);
        total += static_cast<double>(scale[s]) * (four ? small : integers)[size_of((row * n + column) * groups + g)];
        int64_t sum = 0;
        for (int64_t i = g * (group ? group : k); i < (g + 1) * (group ? group : k); ++i) {
            sum += four ? a[size_of(row * k + i)] >> 4 : a[size_of(row * k + i)];
        }
        total -= static_cast<double>(shift[s]) * static_cast<double>(sum);
    }
    return total * a_scale[size_of(row)] + bias[size_of(column)];
}

// ---- checks --------------------------------------------------------------------------------------------------------

void check_layout(const Problem& p) {
    std::vector<char> seen(size_of(p16k8_bytes(p.n, p.k) - kHeaderBytes) * 2, 0);
    for (int64_t column = 0; column < column_blocks(p.n) * 16; ++column)
        for (int64_t i = 0; i < k_steps(p.k) * 8; ++i) {
            const NibblePlace place = p16k8_place(column, i, k_steps(p.k));
            const int stored = p.packed[size_of(kHeaderBytes + place.byte)] >> place.shift & 15;
            const bool real = column < p.n && i < p.k;
            CHECK(stored == (real ? p.q[size_of(column * p.k + i)] + 8 : 8), "column %ld k %ld", column, i);
            seen[size_of(place.byte * 2 + place.shift / 4)] += 1;
        }
    for (char count : seen) CHECK(count == 1, "p16k8 is no bijection");
}

void check_integers(const Problem& p, ParallelFor loop, const char* tier) {
    Guarded<int32_t> out(size_of(p.m * p.n), p.at_end);
    w4a8_i32(p.a.get(), p.k, p.m, p.weight(false), out.get(), loop);
    for (int64_t i = 0; i < p.m * p.n; ++i) {
        int32_t want = 0;
        for (int64_t g = 0; g < p.groups; ++g) want += p.integers[size_of(i * p.groups + g)];
        CHECK(out[size_of(i)] == want, "%s m=%ld n=%ld k=%ld at %ld: %d, not %d", tier, p.m, p.n, p.k, i,
              out[size_of(i)], want);
    }
}

void check_floats(const Problem& p, ParallelFor loop, bool four, const char* tier) {
    Guarded<float> out(size_of(p.m * p.n), p.at_end);
    W4A8Call call{};
    call.a = four ? static_cast<const void*>(p.nibbles.get()) : p.a.get();
    call.nibbles = four;
    call.row_bytes = four ? p.k / 2 : p.k;
    call.m = p.m;
    call.a_scale = p.a_scale.get();
    call.weight = p.weight(true);
    call.out = {p.bias.get(), out.get(), Float::fp32};
    w4a8(call, loop);
    const double bound = 1e-6 * std::sqrt(static_cast<double>(p.k)) * 1500;  // terms up to 16 * 128 * scales of one
    for (int64_t i = 0; i < p.m * p.n; ++i) {
        const double want = p.answer(i / p.n, i % p.n, four), gap = std::fabs(out[size_of(i)] - want);
        CHECK(gap <= bound, "%s m=%ld n=%ld k=%ld group=%ld four=%d at %ld: %g, not %g", tier, p.m, p.n, p.k, p.group,
              four, i, static_cast<double>(out[size_of(i)]), want);
    }
    Guarded<uint16_t> half(size_of(p.m * p.n), p.at_end);
    for (Float dtype : {Float::bf16, Float::fp16}) {
        std::memset(half.get(), 0x7F, half.size() * 2);
        call.out = {p.bias.get(), half.get(), dtype};
        w4a8(call, loop);
        for (size_t i = 0; i < half.size(); ++i) CHECK(half[i] != 0x7F7F, "%s: element %zu not written", tier, i);
    }
}

void check_float_activations(const Problem& p, ParallelFor loop, const char* tier) {
    Guarded<float> out(size_of(p.m * p.n), p.at_end);
    W4A16Call call{};
    call.x = p.x.get();
    call.dtype = Float::fp32;
    call.row_stride = p.k;
    call.m = p.m;
    call.weight = p.weight(false);
    call.out = {nullptr, out.get(), Float::fp32};
    w4a16(call, loop);
    for (int64_t i = 0; i < p.m * p.n; ++i) {
        double want = 0;
        for (int64_t g = 0; g < p.groups; ++g) {
            const size_t s = size_of((i % p.n / 16 * p.groups + g) * 16 + i % p.n % 16);
            want += static_cast<double>(p.scale[s]) * p.integers[size_of(i * p.groups + g)] / 16.0;
        }
        CHECK(std::fabs(out[size_of(i)] - want) <= 1e-3 * std::sqrt(static_cast<double>(p.k)), "%s at %ld: %g, not %g",
              tier, i, static_cast<double>(out[size_of(i)]), want);
    }
    Guarded<uint16_t> half(size_of(p.m * p.k), p.at_end), result(size_of(p.m * p.n), p.at_end);
    std::memset(half.get(), 0, half.size() * 2);
    for (Float dtype : {Float::bf16, Float::fp16}) {
        call.x = half.get();
        call.dtype = dtype;
        call.out = {nullptr, result.get(), dtype};
        w4a16(call, loop);
        for (size_t i = 0; i < result.size(); ++i) CHECK((result[i] & 0x7FFF) == 0, "%s: zero times w", tier);
    }
}

// The 256-bit VNNI tier through its table: tiles straight from nibbles, one block of columns after the other.
void check_evex(const Problem& p) {
    const GemmTable& kernels = evex_table();
    const int64_t steps = k_steps(p.k);
    for (int64_t first = 0; first < p.m; first += kernels.direct_rows) {
        const int rows = static_cast<int>(std::min<int64_t>(kernels.direct_rows, p.m - first));
        std::vector<int8_t> packed(size_of(steps * rows * 8));
        std::vector<int32_t> sums(size_of(rows)), carry(size_of(rows * 16));
        std::vector<float> total(size_of(rows * 16));
        kernels.pack({reinterpret_cast<const uint8_t*>(p.a.get()) + first * p.k, false, p.k, rows, p.k, p.k, nullptr,
                      packed.data(), sums.data()});
        std::vector<uint8_t> panel(size_of(steps * 128));
        for (int64_t block = 0; block < column_blocks(p.n); ++block) {
            TileTask t{};
            t.a = packed.data();
            t.w = p.packed.get() + kHeaderBytes + block * steps * kBlockBytes;
            t.sums = sums.data();
            t.steps = steps;
            t.groups = 1;
            t.first = true;
            t.total = total.data();
            t.carry = carry.data();
            t.leading = 16;
            for (bool unpacked : {false, true}) {
                std::fill(carry.begin(), carry.end(), -1);
                if (unpacked) kernels.unpack(t.w, 0, steps, 1, panel.data());
                if (unpacked) t.w = panel.data();
                unpacked ? kernels.panel(t, rows, 1) : kernels.direct(t, rows, 1);
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t c = 0; c < std::min<int64_t>(16, p.n - block * 16); ++c) {
                        int32_t want = 0;
                        for (int64_t g = 0; g < p.groups; ++g) {
                            want += p.integers[size_of(((first + r) * p.n + block * 16 + c) * p.groups + g)];
                        }
                        CHECK(carry[size_of(r * 16 + c)] == want, "evex panel=%d row %ld column %ld", unpacked, r, c);
                    }
            }
        }
    }
}

void check_all(const Problem& p) {
    check_layout(p);
    for (Isa tier : {Isa::scalar, Isa::avx2, Isa::avxvnni, Isa::avx512bw, Isa::avx512vnni}) {
        if (!isa_supported(tier)) continue;
        force_isa(isa_name(tier));
        for (ParallelFor loop : {serial, one_by_one, threads}) check_integers(p, loop, isa_name(tier));
        for (bool four : {false, true}) check_floats(p, one_by_one, four, isa_name(tier));
        check_float_activations(p, threads, isa_name(tier));
        int32_t sink = 0;
        CHECK(floor_dot(3, 2, &sink, threads) > 0, "floor");
        floor_read(p.packed.get(), static_cast<int64_t>(p.packed.size()), threads);
    }
    force_isa(nullptr);
    if (isa_supported(Isa::avx512vnni)) check_evex(p);
}

void check_canonical() {
    Guarded<int8_t> q(16);
    Guarded<uint8_t> packed(8);
    for (int stray : {-128, -9, 8, 127}) {
        for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<int8_t>(static_cast<int>(i) - 8);
        CHECK(pack_int4(q.get(), packed.get(), 16, serial), "all sixteen values fit");
        Guarded<int8_t> back(16);
        unpack_int4(packed.get(), back.get(), 8, serial);
        CHECK(std::memcmp(back.get(), q.get(), 16) == 0, "round trip");
        q[5] = static_cast<int8_t>(stray);
        CHECK(!pack_int4(q.get(), packed.get(), 16, serial), "%d does not fit", stray);
    }
}

}  // namespace

// "short" leaves out most of the sizes: for builds that are ten times slower.
int main(int argc, char** argv) {
    const bool brief = argc > 1 && std::strcmp(argv[1], "short") == 0;
    check_canonical();
    const int64_t rows[] = {1, 2, 4, 5, 8, 13, 16, 17, 30, 40};
    const int64_t columns[] = {1, 15, 16, 33, 64, 100, 48, 70, 31, 17};
    const struct {
        int64_t k, group;
    } depths[] = {{2, 0}, {8, 8}, {10, 0}, {64, 16}, {120, 24}, {1000, 0}, {256, 128}, {2304, 1152}, {1032, 0}};
    int problems = 0;
    for (size_t i = 0; i < 10; i += brief ? 3 : 1)
        for (const auto& depth : depths)
            for (bool at_end : {true, false}) {
                check_all(Problem(rows[i], columns[i], depth.k, depth.group, at_end, 7u + static_cast<unsigned>(i)));
                ++problems;
            }
    check_all(Problem(260, 35, 24, 8, true, 3));  // more than one chunk of rows
    std::printf("%d problems, %d failures%s\n", problems + 1, failures, failures ? "" : ", all well");
    return failures != 0;
}
