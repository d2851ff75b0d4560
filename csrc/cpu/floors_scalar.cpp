#include "floors_loops.h"
#include "gemm_vec_scalar.h"

namespace qexp {

constexpr FloorTable floor_scalar = make_floors<Scalar>();

}  // namespace qexp
