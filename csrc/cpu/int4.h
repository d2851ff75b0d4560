// Canonical int4 (checkpoints): byte j of a row holds element 2j in its low nibble and 2j + 1 in the high one, two's
// complement, -8..7.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace qexp {

// q: count values, count even. Returns false, leaving packed undefined, if a value lies outside -8..7.
bool pack_int4(const int8_t* q, uint8_t* packed, int64_t count, ParallelFor loop);

// q receives 2 * bytes values.
void unpack_int4(const uint8_t* packed, int8_t* q, int64_t bytes, ParallelFor loop);

}  // namespace qexp
