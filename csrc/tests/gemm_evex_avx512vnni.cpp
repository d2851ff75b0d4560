// The AVX-VNNI tier's source in the EVEX encoding: its arithmetic runs on CPUs that have AVX-512 VNNI but not AVX-VNNI.
#include "gemm_tiles.h"
#include "gemm_vec_avxvnni.h"

namespace qexp {

const GemmTable& evex_table() {
    static constexpr GemmTable table = make_table<AvxVnni>();
    return table;
}

}  // namespace qexp
