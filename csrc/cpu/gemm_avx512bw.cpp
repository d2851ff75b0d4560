#include "gemm_tiles.h"
#include "gemm_vec_avx512bw.h"

namespace qexp {

constexpr GemmTable gemm_avx512bw = make_table<Avx512Bw>();

}  // namespace qexp
