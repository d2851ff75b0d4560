#include "dispatch.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qexp {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avxvnni", "avx512bw", "avx512vnni"};
constexpr int kTiers = 5;

struct Features {
    bool tier[kTiers] = {true, false, false, false, false};
    bool bf16 = false;
};

#if defined(__x86_64__)

struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
    return r;
}

bool bit(uint32_t word, int index) { return ((word >> index) & 1) != 0; }

// The register states that the operating system saves; without OSXSAVE none of the wide ones.
uint32_t saved_states(const Registers& leaf1) {
    if (!bit(leaf1.c, 27)) return 0;
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

Features detect() {
    constexpr uint32_t kYmm = 0x6, kZmm = 0xE6;  // XCR0: SSE and AVX; plus opmask and both halves of ZMM
    Features f;
    const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
    const uint32_t saved = saved_states(leaf1);
    const bool ymm = (saved & kYmm) == kYmm, zmm = (saved & kZmm) == kZmm;
    const bool fma = bit(leaf1.c, 12), f16c = bit(leaf1.c, 29), avx2 = bit(leaf7.b, 5);
    const bool base512 = bit(leaf7.b, 16) && bit(leaf7.b, 17) && bit(leaf7.b, 30) && bit(leaf7.b, 31);
    f.tier[1] = ymm && fma && f16c && avx2;
    f.tier[2] = f.tier[1] && bit(leaf7_1.a, 4);
    f.tier[3] = f.tier[1] && zmm && base512;
    f.tier[4] = f.tier[3] && bit(leaf7.c, 11);
    f.bf16 = f.tier[4] && bit(leaf7_1.a, 5);
    return f;
}

#else

Features detect() { return {}; }

#endif

const Features& features() {
    static const Features f = detect();
    return f;
}

std::string choices() {
    std::string text;
    for (int i = 0; i < kTiers; ++i) {
        if (features().tier[i]) text += (text.empty() ? "" : ", ") + std::string(kNames[i]);
    }
    return text;
}

int best() {
    int tier = kTiers - 1;
    while (!features().tier[tier]) --tier;
    return tier;
}

int parse(const std::string& name) {
    for (int i = 0; i < kTiers; ++i) {
        if (name == kNames[i] && features().tier[i]) return i;
    }
    throw std::invalid_argument("QEXP_CPU_ISA=" + name + ": this CPU offers " + choices() +
                                "; unset the variable for the best of them");
}

int from_environment() {
    const char* name = std::getenv("QEXP_CPU_ISA");
    return name == nullptr || *name == '\0' ? best() : parse(name);
}

std::atomic<int> forced{-1};

}  // namespace

Isa isa() {
    const int tier = forced.load(std::memory_order_relaxed);
    if (tier >= 0) return static_cast<Isa>(tier);
    static const int chosen = from_environment();  // a throw leaves it unset: the next call throws again
    return static_cast<Isa>(chosen);
}

const char* isa_name(Isa tier) { return kNames[static_cast<int>(tier)]; }

bool isa_supported(Isa tier) { return features().tier[static_cast<int>(tier)]; }

void force_isa(const char* name) { forced.store(name == nullptr ? -1 : parse(name), std::memory_order_relaxed); }

bool use_avx512bf16() { return features().bf16 && isa() == Isa::avx512vnni; }

}  // namespace qexp

// For Python (ctypes): the tier's name, or the complaint about QEXP_CPU_ISA after "error: ".
extern "C" __attribute__((visibility("default"))) const char* qexp_cpu_isa() {
    static thread_local std::string answer;
    try {
        answer = qexp::isa_name(qexp::isa());
    } catch (const std::exception& problem) {
        answer = std::string("error: ") + problem.what();
    }
    return answer.c_str();
}

// For tests: force a tier, nullptr to go back; "" on success, else the complaint.
extern "C" __attribute__((visibility("default"))) const char* qexp_force_isa(const char* name) {
    static thread_local std::string answer;
    try {
        answer.clear();
        qexp::force_isa(name);
    } catch (const std::exception& problem) {
        answer = problem.what();
    }
    return answer.c_str();
}
