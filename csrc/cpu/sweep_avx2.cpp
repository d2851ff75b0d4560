#include "sweep_loops.h"

namespace qexp {

void sweep_avx2(const Sweep& sweep, int64_t begin, int64_t end) { sweep_rows(sweep, begin, end); }

}  // namespace qexp
