#include "floors_loops.h"
#include "gemm_vec_avx512bw.h"

namespace qexp {

constexpr FloorTable floor_avx512bw = make_floors<Avx512Bw>();

}  // namespace qexp
