#include "floors_loops.h"
#include "gemm_vec_avxvnni.h"

namespace qexp {

constexpr FloorTable floor_avxvnni = make_floors<AvxVnni>();

}  // namespace qexp
