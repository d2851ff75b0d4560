// Which instruction set the kernels use: decided once per process, from CPUID and XGETBV.
#pragma once

namespace qexp {

// In order of preference, best last. A tier implies the features its translation units are compiled with:
// avx2 = AVX2 + FMA + F16C; avxvnni = avx2 + AVX-VNNI; avx512bw = avx2 + F, BW, VL, DQ; avx512vnni = avx512bw + VNNI.
enum class Isa { scalar, avx2, avxvnni, avx512bw, avx512vnni };

// The best tier of this CPU, or the one named by the environment variable QEXP_CPU_ISA.
// Throws std::invalid_argument, naming the choices, if that variable is unknown or asks for what the CPU lacks.
Isa isa();

const char* isa_name(Isa tier);
bool isa_supported(Isa tier);

// The kernel for isa() among those of an op whose byte dot product plays no part: the width of the vectors decides.
template <typename Kernel>
const Kernel& by_width(const Kernel& scalar, const Kernel& avx2, const Kernel& avx512bw) {
    switch (isa()) {
        case Isa::avx512vnni:
        case Isa::avx512bw:
            return avx512bw;
        case Isa::avxvnni:
        case Isa::avx2:
            return avx2;
        case Isa::scalar:
            break;
    }
    return scalar;
}

// The same for kernels that differ by this ending; away from x86 only the portable one is compiled.
#if defined(__x86_64__)
#define QEXP_BY_WIDTH(kernel) by_width(kernel##_scalar, kernel##_avx2, kernel##_avx512bw)
#else
#define QEXP_BY_WIDTH(kernel) kernel##_scalar
#endif

// For tests: from now on isa() answers `name`; nullptr goes back to the environment. Throws as isa() does.
// Not meant to be called while kernels run in other threads.
void force_isa(const char* name);

// AVX512_BF16 is no tier of its own: CPUs with VNNI exist with and without it. False when a tier below avx512vnni is
// chosen, so that a forced tier means what it says.
bool use_avx512bf16();

}  // namespace qexp
