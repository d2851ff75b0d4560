#include "sweep_loops.h"

namespace qexp {

void sweep_avx512bw(const Sweep& sweep, int64_t begin, int64_t end) { sweep_rows(sweep, begin, end); }

}  // namespace qexp
