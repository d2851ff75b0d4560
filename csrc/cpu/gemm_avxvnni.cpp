#include "gemm_tiles.h"
#include "gemm_vec_avxvnni.h"

namespace qexp {

constexpr GemmTable gemm_avxvnni = make_table<AvxVnni>();

}  // namespace qexp
