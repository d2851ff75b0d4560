// Loops that are unrolled before the optimiser looks: gcc unrolls `for` too late to move small arrays of vectors, the
// accumulators of a tile, from the stack into registers.
#pragma once

#include <utility>

#define QEXP_INLINE __attribute__((always_inline))

namespace qexp {
namespace {

template <class Body, int... I>
inline QEXP_INLINE void times(Body&& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}

// body(0), body(1), ..., body(N - 1), each index a compile-time constant.
template <int N, class Body>
inline QEXP_INLINE void times(Body&& body) {
    times(body, std::make_integer_sequence<int, N>{});
}

// body(r, c) for all r < R and c < C, row by row.
template <int R, int C, class Body>
inline QEXP_INLINE void grid(Body&& body) {
    times<R>([&](auto r) QEXP_INLINE { times<C>([&](auto c) QEXP_INLINE { body(r, c); }); });
}

}  // namespace
}  // namespace qexp
