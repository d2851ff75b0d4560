// Chooses the tier and splits the rows.
#include "hadamard.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "dispatch.h"

namespace qexp {
namespace {

constexpr int64_t kTaskElements = 1 << 16;  // about 20 us of one core

const HadamardKernels& kernels() { return QEXP_BY_WIDTH(hadamard); }

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};

// Work space of this thread, kept between calls: a fresh large block would fault on every page.
float* workspace(int64_t floats) {
    thread_local std::unique_ptr<float, Free> memory;
    thread_local int64_t size = 0;
    if (floats > size) {
        const auto bytes = static_cast<size_t>((floats + 15) / 16 * 64);
        memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        size = memory ? floats : 0;
        if (!memory) throw std::bad_alloc();
    }
    return memory.get();
}

template <typename Task>
void run(const Task& task, void (*worker)(const Task&, int64_t, int64_t, float*), ParallelFor loop) {
    const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, task.n));
    deal(loop, task.rows, grain,
         [&](int64_t begin, int64_t end) { worker(task, begin, end, workspace(work_floats(task.n))); });
}

// Which of the eight sums (a +- b) +- (c +- d) a group of signs is, up to the sign of a: bit 0 for b against a, bit 1
// for d against c, bit 2 for c against a.
uint8_t pattern(const int8_t* signs, int64_t count) {
    bool minus[4] = {};
    for (int64_t t = 0; t < std::min<int64_t>(count, 4); ++t) minus[t] = (signs[t] < 0) != (signs[0] < 0);
    return static_cast<uint8_t>(minus[1] | ((minus[2] != minus[3]) << 1) | (minus[2] << 2));
}

bool all_signs(const int8_t* had_k, int64_t order) {
    return std::all_of(had_k, had_k + order * order, [](int8_t entry) { return entry == 1 || entry == -1; });
}

// The picks of one row's chunk, groups [begin, end), those to add first; returns how many these are.
int64_t pick(const int8_t* row, int64_t order, int64_t begin, int64_t end, uint8_t* to) {
    int64_t done = 0, added = 0;
    for (const bool negative : {false, true}) {
        for (int64_t g = begin; g < end; ++g) {
            if ((row[4 * g] < 0) != negative) continue;
            to[done++] = static_cast<uint8_t>(8 * (g - begin) + pattern(row + 4 * g, order - 4 * g));
        }
        if (!negative) added = done;
    }
    return added;
}

}  // namespace


// The row; signed sums: 8 for a chunk of groups, four vectors of 16 each; totals: two vectors for every row of H_K'.
int64_t work_floats(int64_t n) { return 4 * n + Rotation::kChunk * 8 * 4 * 16 + 64; }

Picks picks_of(const int8_t* had_k, int64_t order) {
    if (!all_signs(had_k, order)) return {};
    Rotation shape;
    shape.order = order;
    const int64_t groups = shape.groups(), chunks = shape.chunks();
    Picks made{std::vector<uint8_t>(static_cast<size_t>(order * groups)),
               std::vector<uint8_t>(static_cast<size_t>(order * chunks))};
    for (int64_t i = 0; i < order; ++i) {
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t begin = c * Rotation::kChunk, end = std::min(groups, begin + Rotation::kChunk);
            const int64_t added = pick(had_k + i * order, order, begin, end, made.picks.data() + i * groups + begin);
            made.positives[static_cast<size_t>(i * chunks + c)] = static_cast<uint8_t>(added);
        }
    }
    return made;
}

void hadamard(const HadamardTask& task, ParallelFor loop) { run(task, kernels().hadamard, loop); }

void had_quant(const HadQuantTask& task, ParallelFor loop) { run(task, kernels().had_quant, loop); }

}  // namespace qexp
