#include "gemm_tiles.h"
#include "gemm_vec_avx512vnni.h"

namespace qexp {

constexpr GemmTable gemm_avx512vnni = make_table<Avx512Vnni>();

}  // namespace qexp
