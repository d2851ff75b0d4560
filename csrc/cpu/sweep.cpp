#include "sweep.h"

#include <algorithm>

#include "dispatch.h"

namespace qexp {
namespace {

constexpr int64_t kRows = 128;  // of a task at a time: 32 columns of targets and errors fill a first-level cache

using Rows = void (*)(const Sweep& sweep, int64_t begin, int64_t end);

Rows rows_kernel() { return QEXP_BY_WIDTH(sweep); }

}  // namespace

void sweep_columns(const Sweep& sweep, ParallelFor loop) {
    const Rows kernel = rows_kernel();
    split(loop, (sweep.rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            kernel(sweep, part * kRows, std::min(sweep.rows, (part + 1) * kRows));
        }
    });
}

}  // namespace qexp
