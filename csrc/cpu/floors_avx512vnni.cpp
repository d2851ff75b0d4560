#include "floors_loops.h"
#include "gemm_vec_avx512vnni.h"

namespace qexp {

constexpr FloorTable floor_avx512vnni = make_floors<Avx512Vnni>();

}  // namespace qexp
