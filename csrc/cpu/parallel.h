// How a kernel splits its work: the caller lends a loop, so the core knows neither torch nor OpenMP.
//
// The torch binding lends a loop of libtorch's, the test binary std::thread or a plain loop. A kernel hands out ranges of
// [0, count); every output element belongs to exactly one range, so results do not depend on how many threads there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace qexp {

using Task = void (*)(void* context, int64_t begin, int64_t end);

// Runs task over disjoint ranges that cover [0, count), on as many threads as have about `grain` each.
using ParallelFor = void (*)(int64_t count, int64_t grain, Task task, void* context);

// Calls body(begin, end) through the lent loop; body may be any callable.
template <typename Body>
void split(ParallelFor loop, int64_t count, int64_t grain, Body&& body) {
    loop(count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
         &body);
}

// Tasks 0..count that threads take one by one as they become free: where a task is long, a core that other work slows
// down holds nobody up. Each range that a loop hands out empties it: for (int64_t i; queue.take(i);) ...
class Queue {
   public:
    explicit Queue(int64_t count) : count_(count) {}
    bool take(int64_t& task) { return (task = next_.fetch_add(1, std::memory_order_relaxed)) < count_; }

   private:
    std::atomic<int64_t> next_{0};
    int64_t count_;
};

// As split, with a queue of pieces of `grain`: body(begin, end) may be called several times by one thread.
template <typename Body>
void deal(ParallelFor loop, int64_t count, int64_t grain, Body&& body) {
    const int64_t pieces = (count + grain - 1) / grain;
    Queue queue(pieces);
    split(loop, pieces, 1, [&](int64_t, int64_t) {
        for (int64_t i; queue.take(i);) body(i * grain, std::min(count, (i + 1) * grain));
    });
}

}  // namespace qexp
