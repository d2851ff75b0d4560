// What the machine can do at best, measured beside the kernels: a loop that only reads, a loop that only multiplies.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace qexp {

// Reads `bytes` bytes (a multiple of 64 is read, the rest is left) and returns their xor, so that nothing can be skipped.
uint64_t floor_read(const void* data, int64_t bytes, ParallelFor loop);

// Runs the tier's byte dot product `steps` times on registers, in each of `workers` tasks. Returns the operations done
// (a product and an addition are two); *sink receives a value that depends on all of them.
int64_t floor_dot(int64_t steps, int64_t workers, int32_t* sink, ParallelFor loop);

struct FloorTable {
    uint64_t (*read)(const uint64_t* words, int64_t count);  // count is a multiple of 8
    int32_t (*dot)(int64_t steps);
    int64_t operations;  // of one step of dot
};

extern const FloorTable floor_scalar;
#if defined(__x86_64__)
extern const FloorTable floor_avx2, floor_avxvnni, floor_avx512bw, floor_avx512vnni;
#endif

}  // namespace qexp
