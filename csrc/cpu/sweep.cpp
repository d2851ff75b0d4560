#include "sweep.h"

#include "dispatch.h"

namespace qexp {
namespace {

constexpr int64_t kRows = 128;  // of a task at a time: 32 columns of targets and errors fill a first-level cache

using Rows = void (*)(const Sweep& sweep, int64_t begin, int64_t end);

Rows rows_kernel() { return QEXP_BY_WIDTH(sweep); }

}  // namespace

void sweep_columns(const Sweep& sweep, ParallelFor loop) {
    const Rows kernel = rows_kernel();
    deal(loop, sweep.rows, kRows, [&](int64_t begin, int64_t end) { kernel(sweep, begin, end); });
}

}  // namespace qexp
