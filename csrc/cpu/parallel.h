// How a kernel splits its work: the caller lends a loop, so the core knows neither torch nor OpenMP.
//
// The torch binding lends a loop of libtorch's, the test binary std::thread or a plain loop. A kernel hands out ranges of
// [0, count); every output element belongs to exactly one range, so results do not depend on how many threads there are.
#pragma once

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

}  // namespace qexp
