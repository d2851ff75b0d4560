#include "floors_loops.h"
#include "gemm_vec_avx2.h"

namespace qexp {

constexpr FloorTable floor_avx2 = make_floors<Avx2Madd>();

}  // namespace qexp
