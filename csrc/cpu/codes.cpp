// Chooses the tier and splits the rows.
#include "codes.h"

#include <algorithm>

#include "dispatch.h"

namespace qexp {
namespace {

constexpr int64_t kTaskElements = 1 << 16;  // tens of microseconds of one core

const CodesKernels& kernels() { return QEXP_BY_WIDTH(codes); }

template <typename Task>
void run(const Task& task, void (*worker)(const Task&, int64_t, int64_t), ParallelFor loop) {
    const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, task.n));
    deal(loop, task.rows, grain, [&](int64_t begin, int64_t end) { worker(task, begin, end); });
}

}  // namespace

void quantize_codes(const QuantizeTask& task, ParallelFor loop) { run(task, kernels().quantize, loop); }
void dequantize_codes(const DequantizeTask& task, ParallelFor loop) { run(task, kernels().dequantize, loop); }
void fake_quantize(const FakeQuantizeTask& task, ParallelFor loop) { run(task, kernels().fake_quantize, loop); }

}  // namespace qexp
