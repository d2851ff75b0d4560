#include "gemm_tiles.h"
#include "gemm_vec_avx2.h"

namespace qexp {

constexpr GemmTable gemm_avx2 = make_table<Avx2Madd>();

}  // namespace qexp
