// codes.h with AVX2, FMA and F16C: the avx2 and avxvnni tiers.
#include "vec_avx2.h"
// The vectors come first: the kernels below are compiled for them.
#include "codes_simd.h"

namespace qexp {

using Rows256 = CodesRows<Vec256, codes_scalar>;
const CodesKernels codes_avx2 = {Rows256::quantize, Rows256::dequantize, Rows256::fake_quantize};

}  // namespace qexp
