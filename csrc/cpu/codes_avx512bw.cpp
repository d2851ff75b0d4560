// codes.h with AVX-512 F, BW, VL, DQ: both AVX-512 tiers.
#include "vec_avx512.h"
// The vectors come first: the kernels below are compiled for them.
#include "codes_simd.h"

namespace qexp {

using Rows512 = CodesRows<Vec512, codes_avx2>;
const CodesKernels codes_avx512bw = {Rows512::quantize, Rows512::dequantize, Rows512::fake_quantize};

}  // namespace qexp
