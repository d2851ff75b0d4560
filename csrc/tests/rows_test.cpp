// Rotation, quantization and codes without torch: every tier of this machine against the plain one, between guard pages
// and into poisoned memory. Built and run by tests/unit/test_had_quant.py, also with the sanitizers.
//
// Every input and output ends where a page without access begins, or begins where one ends, so that a read or write one
// byte too far is a crash. Two runs over different poison must agree: every byte of an output is written.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "codes.h"
#include "dispatch.h"
#include "hadamard.h"

namespace {

using namespace qexp;

int failures = 0, cases = 0;

void check(bool condition, const char* what, int64_t n, Dtype dtype, const char* tier) {
    ++cases;
    if (condition) return;
    const int kind = static_cast<int>(dtype);
    std::printf("%s differs: n=%lld dtype=%d tier=%s\n", what, static_cast<long long>(n), kind, tier);
    if (++failures > 20) std::exit(1);
}

// Bytes with a page that must not be touched behind their end (or before their beginning).
class Guarded {
   public:
    Guarded(int64_t bytes, bool at_end) : bytes_(static_cast<size_t>(bytes)) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t inner = (bytes_ + page) / page * page;
        total_ = inner + 2 * page;
        void* memory = mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        base_ = static_cast<char*>(memory);
        if (mprotect(base_ + page, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
        data_ = base_ + page + (at_end ? inner - bytes_ : 0);
    }
    ~Guarded() { munmap(base_, total_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    void poison(int value) { std::memset(data_, value, bytes_); }
    std::vector<char> bytes() const { return {data_, data_ + bytes_}; }

   private:
    size_t bytes_, total_;
    char *base_, *data_;
};

void one_by_one(int64_t count, int64_t grain, Task task, void* context) {
    for (int64_t i = 0; i < count; i += grain) task(context, i, std::min(count, i + grain));
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

// Values of a normal size, in any of the formats; one row in four holds a NaN, an Inf or only zeros.
void fill(const Guarded& x, int64_t rows, int64_t n, Dtype dtype, std::mt19937& random) {
    for (int64_t i = 0; i < rows * n; ++i) {
        const float value = (static_cast<float>(random() % 20001) - 10000.0f) / 1000.0f;
        if (dtype == Dtype::fp32) {
            x.as<float>()[i] = value;
        } else {  // exponents that both 16-bit formats call ordinary
            x.as<uint16_t>()[i] = static_cast<uint16_t>((random() & 0x83FFu) | 0x3C00u);
        }
    }
    const int64_t row = static_cast<int64_t>(random()) % rows;
    const unsigned kind = random() % 4;
    for (int64_t i = row * n; i < (row + 1) * n; ++i) {
        if (kind == 0 && dtype == Dtype::fp32) x.as<float>()[i] = 0.0f;
        if (kind == 0 && dtype != Dtype::fp32) x.as<uint16_t>()[i] = 0;
        if (kind == 1 && dtype == Dtype::fp32 && i % 7 == 3) x.as<uint32_t>()[i] = 0x7FC00000u;
        if (kind == 1 && dtype != Dtype::fp32 && i % 7 == 3) x.as<uint16_t>()[i] = 0x7FC0u;
    }
}

// Runs `work`, which fills `outputs`, over two poisons and on every tier; all must agree with the scalar tier.
template <typename Work>
void compare(const char* what, int64_t n, Dtype dtype, std::vector<Guarded*> outputs, Work work) {
    std::vector<std::vector<char>> expected;
    for (const Isa tier : {Isa::scalar, Isa::avx2, Isa::avxvnni, Isa::avx512bw, Isa::avx512vnni}) {
        if (!isa_supported(tier)) continue;
        force_isa(isa_name(tier));
        for (const int value : {0x7F, 0x00}) {
            for (Guarded* output : outputs) output->poison(value);
            work();
            for (size_t i = 0; i < outputs.size(); ++i) {
                if (expected.size() <= i) expected.push_back(outputs[i]->bytes());
                check(outputs[i]->bytes() == expected[i], what, n, dtype, isa_name(tier));
            }
        }
    }
    force_isa(nullptr);
}

struct Shape {
    int64_t order;
    int power;
    int64_t blocks, group, sum_group;
};

void rotations(const Shape& s, Dtype dtype, bool at_end, std::mt19937& random) {
    const int64_t rows = 3, n = (s.order << s.power) * s.blocks;
    std::vector<int8_t> signs(static_cast<size_t>(s.order * s.order));
    for (int8_t& sign : signs) sign = random() % 2 ? 1 : -1;
    const Picks picks = picks_of(signs.data(), s.order);
    const Rotation rotation{s.order, s.power, picks.picks.data(), picks.positives.data()};
    Guarded x(rows * n * size_of(dtype), at_end), y(rows * n * size_of(dtype), at_end);
    fill(x, rows, n, dtype, random);
    if (random() % 4 != 0) {  // NaN patterns in y may differ between tiers: keep the transform finite
        for (int64_t i = 0; i < rows * n && dtype == Dtype::fp32; ++i) x.as<float>()[i] = static_cast<float>(i % 19);
        for (int64_t i = 0; i < rows * n && dtype != Dtype::fp32; ++i) x.as<uint16_t>()[i] = 0x3C00 + i % 19;
        compare("hadamard", n, dtype, {&y}, [&] {
            hadamard({x.as<void>(), y.as<void>(), n, rows, n, dtype, rotation, 0.25f}, one_by_one);
        });
    }
    const int64_t group = s.group ? s.group : n, sum_group = s.sum_group ? s.sum_group : n;
    const bool packed = random() % 2 && n % 2 == 0;
    const int bits = packed || random() % 2 ? 4 : 8;
    const float clip = random() % 2 ? 1.0f : 0.7f;
    Guarded q(packed ? rows * n / 2 : rows * n, at_end), scale(rows * n / group * 4, at_end);
    Guarded sums(rows * n / sum_group * 4, at_end);
    for (const bool rotate : {true, false}) {
        compare("had_quant", n, dtype, {&q, &scale, &sums}, [&] {
            had_quant({x.as<void>(), n, rows, n, dtype, rotate ? rotation : Rotation{}, rotate ? 0.125f : 1.0f,
                       clip, bits, packed, group, sum_group, q.as<uint8_t>(), scale.as<float>(),
                       sums.as<int32_t>()},
                      one_by_one);
        });
    }
}

void codes(int64_t n, int64_t group, Dtype dtype, bool at_end, std::mt19937& random) {
    const int64_t rows = 3;
    const int bits = std::vector<int>{2, 4, 8}[random() % 3];
    const GridRule rule{bits, random() % 2 == 0, random() % 2 == 0, 0.9f, random() % 2 == 0};
    Guarded x(rows * n * size_of(dtype), at_end), y(rows * n * size_of(dtype), at_end);
    Guarded packed(rows * n * bits / 8, at_end);
    Guarded scale(rows * n / group * 4, at_end), zero(rows * n / group * 4, at_end);
    fill(x, rows, n, dtype, random);
    compare("quantize_codes", n, dtype, {&packed, &scale, &zero}, [&] {
        quantize_codes({x.as<void>(), n, rows, n, dtype, rule, group, packed.as<uint8_t>(), scale.as<float>(),
                        zero.as<float>()},
                       one_by_one);
    });
    for (int64_t i = 0; i < rows * n / group; ++i) {  // finite again, as above
        scale.as<float>()[i] = 0.5f;
        zero.as<float>()[i] = static_cast<float>(i % 5);
    }
    compare("dequantize_codes", n, dtype, {&y}, [&] {
        dequantize_codes({packed.as<uint8_t>(), scale.as<float>(), zero.as<float>(), rows, n, bits, group, dtype,
                          y.as<void>()},
                         one_by_one);
    });
    for (int64_t i = 0; i < rows * n && dtype == Dtype::fp32; ++i) x.as<float>()[i] = static_cast<float>(i % 19);
    for (int64_t i = 0; i < rows * n && dtype != Dtype::fp32; ++i) x.as<uint16_t>()[i] = 0x3C00 + i % 19;
    compare("fake_quantize", n, dtype, {&y}, [&] {
        fake_quantize({x.as<void>(), n, rows, n, dtype, rule, group, y.as<void>()}, one_by_one);
    });
}

}  // namespace

int main() {
    std::mt19937 random(7);
    const std::vector<Shape> shapes = {
        {1, 0, 1, 0, 0}, {1, 1, 1, 0, 0}, {1, 3, 3, 0, 0}, {1, 4, 2, 16, 8}, {1, 5, 1, 0, 0},
        {1, 6, 2, 32, 64}, {1, 7, 1, 0, 0}, {1, 8, 1, 0, 32}, {1, 8, 3, 256, 64}, {1, 9, 1, 0, 0},
        {1, 11, 1, 0, 0}, {1, 12, 2, 128, 0}, {1, 13, 1, 0, 128}, {1, 15, 1, 0, 0}, {2, 5, 1, 0, 0},
        {3, 0, 1, 0, 0}, {7, 4, 1, 0, 0}, {12, 3, 2, 0, 8}, {12, 5, 1, 0, 0}, {12, 6, 1, 64, 0},
        {20, 8, 1, 0, 0}, {28, 9, 1, 0, 0}, {36, 4, 1, 0, 0}, {66, 5, 1, 0, 0}, {108, 7, 1, 0, 0},
        {172, 6, 1, 0, 0}, {130, 1, 1, 0, 0}, {12, 10, 1, 0, 0}, {5, 6, 3, 0, 0}, {1, 2, 5, 4, 2},
    };
    for (const bool at_end : {true, false}) {
        for (const Dtype dtype : {Dtype::fp32, Dtype::bf16, Dtype::fp16}) {
            for (const Shape& shape : shapes) rotations(shape, dtype, at_end, random);
            for (const int64_t n : {8, 16, 24, 32, 64, 80, 96, 128, 256, 1000}) {
                for (const int64_t parts : {1, 2, 4}) codes(n, n / parts, dtype, at_end, random);
            }
        }
    }
    std::printf("%d comparisons, %s\n", cases, failures ? "FAILED" : "all well");
    return failures ? 1 : 0;
}
