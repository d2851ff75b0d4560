// The entry point of fuzz.h: chooses an op, a tier and the surroundings of a call; compares what two tiers wrote.
#include "fuzz.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <limits>

#include "float16.h"

namespace qexp::fuzz {
namespace {

struct Op {
    const char* name;
    void (*run)(Call& call, Input& input);
};
constexpr Op kOps[] = {{"hadamard", hadamard_rows}, {"had_quant", had_quant_rows}, {"codes", code_rows},
                       {"int4", nibbles},           {"w4a8_i32", integer_product}, {"w4a8", scaled_product},
                       {"w4a16", float_product},    {"gram", second_moment},       {"sweep", column_sweep}};

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kEdges[] = {0.0f,     -0.0f,    1.0f,   -1.0f,       kNan,     -kNan,    kInf,        -kInf,
                            3.4e38f,  -3.4e38f, 1e38f,  1.1754e-38f, 1.2e-38f, -1e-40f,  1.4013e-45f, -1.4013e-45f,
                            65504.0f, 65520.0f, 6e-8f,  2.9e-8f,     0.5f,     -1.5f,    2.5f,        7.5f,
                            127.5f,   -128.5f,  1e-20f, 8388609.0f,  4194304.5f, 12582912.0f, -7.0f,  8.0f};

std::vector<Isa> tiers() {
    std::vector<Isa> found;
    for (Isa tier : {Isa::scalar, Isa::avx2, Isa::avxvnni, Isa::avx512bw, Isa::avx512vnni}) {
        if (isa_supported(tier)) found.push_back(tier);
    }
    return found;
}

// The plain tier's answers, as bits and as numbers.
struct Answers {
    std::vector<uint64_t> bits;
    std::vector<double> values;

    explicit Answers(const Array& array) : bits(array.count()), values(array.count()) {
        for (size_t i = 0; i < array.count(); ++i) {
            bits[i] = array.bits(i);
            values[i] = array.value(i);
        }
    }
};

void compare(const Call& call, const Array& got, const Answers& want, const Close& close) {
    for (size_t i = 0; i < got.count(); ++i) {
        const double value = got.value(i), wanted = want.values[i];
        if (got.bits(i) == want.bits[i] || (std::isnan(value) && std::isnan(wanted))) continue;
        if (close && close(i, wanted, value)) continue;
        fail(call, "%s[%zu] is %.9g (0x%llx), the plain tier says %.9g (0x%llx)", got.name(), i, value,
             static_cast<unsigned long long>(got.bits(i)), wanted, static_cast<unsigned long long>(want.bits[i]));
    }
}

}  // namespace

float Values::next() {
    const uint32_t b = bits();
    switch (style_) {
        case 0: return (static_cast<float>(b % 20001) - 10000.0f) / 1000.0f;
        case 1: return static_cast<float>(b % 256) - 128.0f;
        case 2: return (static_cast<float>(b % 65) - 32.0f) * 0.5f;
        case 3: return from_bits(b & 0x81FFFFFFu);                  // subnormal, or the least normal ones
        case 4: return from_bits((b & 0x80FFFFFFu) | 0x7E000000u);  // near the largest; a few are Inf or NaN
        case 5: return kEdges[b % 32];
        case 6: return from_bits(b);
        case 7: return b % 64 == 0 ? kEdges[b / 64 % 32] : static_cast<float>(b % 1000) / 100.0f;
        default: return 0.0f;  // leaves the work to splice
    }
}

int64_t size_of(Kind kind) {
    constexpr int64_t kSizes[] = {1, 4, 4, 2, 2, 8};
    return kSizes[static_cast<int>(kind)];
}

uint64_t Array::bits(size_t i) const {
    uint64_t bits = 0;
    const auto size = static_cast<size_t>(size_of(kind_));
    std::memcpy(&bits, as<char>() + i * size, size);
    return bits;
}

double Array::value(size_t i) const {
    switch (kind_) {
        case Kind::byte: return as<uint8_t>()[i];
        case Kind::int32: return as<int32_t>()[i];
        case Kind::fp32: return static_cast<double>(as<float>()[i]);
        case Kind::bf16: return static_cast<double>(bf16_to_float(as<uint16_t>()[i]));
        case Kind::fp16: return static_cast<double>(fp16_to_float(as<uint16_t>()[i]));
        case Kind::fp64: break;
    }
    return as<double>()[i];
}

void Array::set(size_t i, float value) const {
    if (kind_ == Kind::fp32) as<float>()[i] = value;
    if (kind_ == Kind::bf16) as<uint16_t>()[i] = float_to_bf16(value);
    if (kind_ == Kind::fp16) as<uint16_t>()[i] = float_to_fp16(value);
    if (kind_ == Kind::fp64) as<double>()[i] = static_cast<double>(value);
}

void Array::fill(Values& values) const {
    const bool real = kind_ != Kind::byte && kind_ != Kind::int32;
    for (size_t i = 0; i < count_ && real; ++i) set(i, values.next());
    for (size_t i = 0; i < bytes() && !real; ++i) as<uint8_t>()[i] = static_cast<uint8_t>(values.bits());
}

void Array::splice(Input& input) const {
    const auto size = static_cast<size_t>(size_of(kind_));
    for (int i = 0; i < 32 && input.left() > size && count_ != 0; ++i) {
        const auto place = static_cast<size_t>(input.number(0, static_cast<int64_t>(count_) - 1));
        for (size_t j = 0; j < size; ++j) as<uint8_t>()[place * size + j] = static_cast<uint8_t>(input.number(0, 255));
    }
}

void describe(Call& call, const char* format, ...) {
    va_list words;
    va_start(words, format);
    std::vsnprintf(call.shape, sizeof call.shape, format, words);
    va_end(words);
}

void fail(const Call& call, const char* format, ...) {
    char text[300];
    va_list words;
    va_start(words, format);
    std::vsnprintf(text, sizeof text, format, words);
    va_end(words);
    std::fprintf(stderr, "fuzz: %s, tier %s: %s; %s at_end=%d\n", call.op, isa_name(call.tier), text, call.shape,
                 call.at_end);
    std::abort();
}

void compare(const Call& call, std::initializer_list<const Array*> outputs, const std::function<void(ParallelFor)>& run,
             const Close& close) {
    std::vector<Answers> wanted;
    for (const bool plain : {true, false}) {
        force_isa(isa_name(plain ? Isa::scalar : call.tier));
        for (const Array* output : outputs) output->poison(call.poisons[plain]);
        run(plain ? serial : call.loop);
        for (size_t i = 0; i < outputs.size(); ++i) {
            const Array& output = *outputs.begin()[i];
            if (plain) wanted.emplace_back(output);
            else compare(call, output, wanted[i], i == 0 ? close : nullptr);
        }
    }
}

}  // namespace qexp::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace qexp;
    static const std::vector<Isa> tiers = fuzz::tiers();
    fuzz::Input input(data, size);
    const fuzz::Op& op = fuzz::kOps[input.number(0, 8)];
    const Isa tier = tiers[static_cast<size_t>(input.number(0, static_cast<int64_t>(tiers.size()) - 1))];
    const int poison = static_cast<int>(input.number(0, 255));
    const ParallelFor loop = input.one_in(32) ? threads : (input.flag() ? one_by_one : serial);
    fuzz::Call call{op.name, tier, loop, input.flag(), {poison, poison ^ 0x7F}, {}};
    op.run(call, input);
    return 0;
}
