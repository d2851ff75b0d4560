#include "floors.h"

#include <atomic>

#include "dispatch.h"

namespace qexp {
namespace {

const FloorTable& table() {
#if defined(__x86_64__)
    switch (isa()) {
        case Isa::avx512vnni: return floor_avx512vnni;
        case Isa::avx512bw: return floor_avx512bw;
        case Isa::avxvnni: return floor_avxvnni;
        case Isa::avx2: return floor_avx2;
        case Isa::scalar: break;
    }
#endif
    return floor_scalar;
}

}  // namespace

uint64_t floor_read(const void* data, int64_t bytes, ParallelFor loop) {
    constexpr int64_t kLine = 8, kGrain = 1 << 12;  // words of a line, lines of a task
    std::atomic<uint64_t> all{0};
    const auto* words = static_cast<const uint64_t*>(data);
    split(loop, bytes / 64, kGrain, [&](int64_t begin, int64_t end) {
        all.fetch_xor(table().read(words + begin * kLine, (end - begin) * kLine), std::memory_order_relaxed);
    });
    return all.load();
}

int64_t floor_dot(int64_t steps, int64_t workers, int32_t* sink, ParallelFor loop) {
    std::atomic<int32_t> all{0};
    split(loop, workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) all.fetch_xor(table().dot(steps), std::memory_order_relaxed);
    });
    *sink = all.load();
    return steps * workers * table().operations;
}

}  // namespace qexp
