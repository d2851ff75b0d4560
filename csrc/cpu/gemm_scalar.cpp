#include "gemm_tiles.h"
#include "gemm_vec_scalar.h"

namespace qexp {

constexpr GemmTable gemm_scalar = make_table<Scalar>();

}  // namespace qexp
