// hadamard.h with AVX-512 F, BW, VL, DQ: both AVX-512 tiers.
#include "vec_avx512.h"
// The vectors come first: the kernels below are compiled for them.
#include "hadamard_simd.h"

namespace qexp {

using Rows512 = HadamardRows<Vec512, hadamard_avx2>;
const HadamardKernels hadamard_avx512bw = {Rows512::hadamard, Rows512::had_quant};

}  // namespace qexp
