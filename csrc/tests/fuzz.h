// Fuzzing of the CPU core, without torch: bytes become one call, and a tier of this CPU must answer as the plain tier does.
//
// fuzz.cpp chooses the op and compares; fuzz_rows.cpp, fuzz_gemm.cpp and fuzz_sums.cpp know the ops. What drives them is
// libFuzzer, or fuzz_main.cpp where there is none. A call is always one the bindings would let through: what they refuse
// is not the kernels' business.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <vector>

#include "dispatch.h"
#include "guarded.h"
#include "parallel.h"

namespace qexp::fuzz {

// What the bytes say, in their order. Behind their end are zeros, so that any cut of an input is an input.
class Input {
   public:
    Input(const uint8_t* data, size_t size) : at_(data), left_(size) {}

    // In [low, high]; one byte where that suffices, so that a changed byte changes one thing.
    int64_t number(int64_t low, int64_t high) {
        const auto range = static_cast<uint64_t>(high - low) + 1;
        uint64_t value = 0;
        for (uint64_t covered = 1; covered < range; covered <<= 8) value = value << 8 | byte();
        return low + static_cast<int64_t>(value % range);
    }
    bool flag() { return (byte() & 1) != 0; }
    bool one_in(int64_t count) { return number(1, count) == count; }
    size_t left() const { return left_; }
    template <class T>
    T pick(std::initializer_list<T> choices) {
        return choices.begin()[number(0, static_cast<int64_t>(choices.size()) - 1)];
    }

   private:
    uint8_t byte() { return left_ == 0 ? uint8_t{0} : (--left_, *at_++); }

    const uint8_t* at_;
    size_t left_;
};

// Numbers of one style: ordinary ones, ties of a rounding, subnormals, what overflows, NaN and Inf, any bits at all.
class Values {
   public:
    explicit Values(Input& input) : style_(static_cast<int>(input.number(0, 8))), state_(seed(input)) {}

    uint32_t bits() {  // splitmix64
        uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        return static_cast<uint32_t>((z ^ (z >> 27)) >> 16);
    }
    float next();

   private:
    static uint64_t seed(Input& input) { return static_cast<uint64_t>(input.number(0, 0xFFFF)); }

    int style_;
    uint64_t state_;
};

enum class Kind { byte, int32, fp32, bf16, fp16, fp64 };
int64_t size_of(Kind kind);

// Elements between guard pages.
class Array {
   public:
    Array(const char* name, Kind kind, int64_t count, bool at_end)
        : name_(name), kind_(kind), count_(static_cast<size_t>(count)),
          memory_(static_cast<size_t>(count * size_of(kind)), at_end) {}

    const char* name() const { return name_; }
    size_t count() const { return count_; }
    size_t bytes() const { return memory_.size(); }
    template <class T = void>
    T* as() const {
        return reinterpret_cast<T*>(memory_.get());
    }
    uint64_t bits(size_t i) const;
    double value(size_t i) const;
    void set(size_t i, float value) const;
    void fill(Values& values) const;
    void splice(Input& input) const;  // some elements become what the bytes that are left say
    void poison(int value) const {
        if (bytes() != 0) std::memset(as(), value, bytes());
    }

   private:
    const char* name_;
    Kind kind_;
    size_t count_;
    Guarded<char> memory_;
};

struct Call {
    const char* op;
    Isa tier;
    ParallelFor loop;
    bool at_end;       // of memory: guard page behind the last element, or before the first
    int poisons[2];    // different ones, so that an element nobody writes shows
    char shape[200];   // for the message
};

__attribute__((format(printf, 2, 3))) void describe(Call& call, const char* format, ...);
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const Call& call, const char* format, ...);

// Whether element i of the first output may be `got` where the plain tier says `want`.
using Close = std::function<bool(size_t i, double want, double got)>;

// run(loop) fills the outputs: on the plain tier, then on the call's. All bits must agree (any NaN is a NaN) unless
// `close` forgives the difference.
void compare(const Call& call, std::initializer_list<const Array*> outputs, const std::function<void(ParallelFor)>& run,
             const Close& close = nullptr);

// Each makes a call of the bytes and compares.
void hadamard_rows(Call& call, Input& input);
void had_quant_rows(Call& call, Input& input);
void code_rows(Call& call, Input& input);
void nibbles(Call& call, Input& input);
void integer_product(Call& call, Input& input);
void scaled_product(Call& call, Input& input);
void float_product(Call& call, Input& input);
void second_moment(Call& call, Input& input);
void column_sweep(Call& call, Input& input);

}  // namespace qexp::fuzz
