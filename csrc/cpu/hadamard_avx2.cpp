// hadamard.h with AVX2, FMA and F16C: the avx2 and avxvnni tiers.
#include "vec_avx2.h"
// The vectors come first: the kernels below are compiled for them.
#include "hadamard_simd.h"

namespace qexp {

using Rows256 = HadamardRows<Vec256, hadamard_scalar>;
const HadamardKernels hadamard_avx2 = {Rows256::hadamard, Rows256::had_quant};

}  // namespace qexp
