// The host's stand-in for what only sm_90a has; see emulator.h.
//
// Bulk copies land at once but count on their barrier, which is what the kernel must wait for; a matrix product reads
// shared memory when it is issued. So missing waits of the consumer for copies are found (the stage is still poisoned
// or old), early releases by the consumer are not: those need the chip.
#pragma once

#include "emulator.h"

namespace qexp::simt {

// Bits 0..15 arrivals missing, 16..31 arrivals of a phase, 32..62 bytes missing (signed), 63 the phase's parity.
using Barrier = uint64_t;

struct TensorMap {
    const uint8_t* base;
    int64_t rows, columns, stride;
    int box_rows;
};

namespace emulated {

struct BarrierState {
    uint32_t missing, each;
    int32_t bytes;
    uint32_t parity;
    explicit BarrierState(uint64_t word)
        : missing(word & 0xFFFF),
          each(word >> 16 & 0xFFFF),
          bytes(static_cast<int32_t>(word >> 32 << 1) >> 1),
          parity(word >> 63) {}
    void save(Barrier* barrier) {
        if (missing == 0 && bytes == 0) missing = each, parity ^= 1;
        *barrier = static_cast<uint64_t>(parity) << 63 |
                   static_cast<uint64_t>(static_cast<uint32_t>(bytes) & 0x7FFFFFFFu) << 32 |
                   static_cast<uint64_t>(each) << 16 | missing;
        ++block->progress;
    }
};

inline void change(Barrier* barrier, uint32_t arrivals, int32_t bytes) {
    BarrierState state(*barrier);
    if (arrivals > state.missing) fail("more arrivals at a barrier than it expects");
    state.missing -= arrivals, state.bytes += bytes;
    state.save(barrier);
}

}  // namespace emulated

inline void barrier_init(Barrier* barrier, int arrivals) {
    *barrier = static_cast<uint64_t>(arrivals) << 16 | static_cast<uint64_t>(arrivals);
}
inline void barrier_fence() {}
inline void barrier_arrive(Barrier* barrier) { emulated::change(barrier, 1, 0); }
inline void barrier_expect(Barrier* barrier, int bytes) {
    emulated::BarrierState state(*barrier);
    state.bytes += bytes;
    *barrier = static_cast<uint64_t>(state.parity) << 63 |
               static_cast<uint64_t>(static_cast<uint32_t>(state.bytes) & 0x7FFFFFFFu) << 32 | (*barrier & 0xFFFFFFFFu);
    emulated::change(barrier, 1, 0);
}
inline void barrier_wait(Barrier* barrier, int parity) {
    emulated::wait_until([&] { return emulated::BarrierState(*barrier).parity != static_cast<uint32_t>(parity); });
}

inline void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
        emulated::fail("a bulk copy is not aligned");
    std::memcpy(to, from, static_cast<size_t>(bytes));
    emulated::change(barrier, 0, -bytes);
}
inline void copy_box(void* to, const TensorMap* map, int x, int y, Barrier* barrier) {
    if (reinterpret_cast<uintptr_t>(to) % 1024) emulated::fail("a swizzled box is not aligned to 1024 bytes");
    for (int row = 0; row < map->box_rows; ++row)
        for (int column = 0; column < 128; ++column) {
            const bool inside = y + row < map->rows && x + column < map->columns;
            const uint8_t value = inside ? map->base[(y + row) * map->stride + x + column] : 0;
            static_cast<uint8_t*>(to)[cuda::chunk_in_128(row, column / 16) + column % 16] = value;
        }
    emulated::change(barrier, 0, -map->box_rows * 128);
}
inline int describe(TensorMap* map, const void* base, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
    if (stride % 16 || reinterpret_cast<uintptr_t>(base) % 16 || box_rows > 256) return 1;
    *map = {static_cast<const uint8_t*>(base), rows, columns, stride, box_rows};
    return 0;
}

template <int>
void fewer_registers() {}
template <int>
void more_registers() {}
inline void sync_some(int barrier, int count) {
    emulated::meet(emulated::block->named[barrier], 0, count, nullptr, "named barrier", [](void**) {});
}

inline void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
    struct Mine {
        void* row;
        const uint32_t* r;
    } mine{row, r};
    if (reinterpret_cast<uintptr_t>(row) % 16) emulated::fail("a matrix row is not aligned");
    emulated::in_warp(&mine, "stmatrix.trans", [](void** all) {
        for (int m = 0; m < 4; ++m)
            for (int i = 0; i < 32; ++i) {
                const uint32_t two = static_cast<Mine*>(all[i])->r[m];
                for (int e = 0; e < 2; ++e) {  // element (i / 4, 2 (i % 4) + e) of the lanes' matrix, stored transposed
                    auto* to = static_cast<uint16_t*>(static_cast<Mine*>(all[8 * m + 2 * (i % 4) + e])->row);
                    to[i / 4] = static_cast<uint16_t>(two >> (16 * e));
                }
            }
    });
}

inline uint64_t operand_in_128(const void* tile) { return reinterpret_cast<uint64_t>(tile) >> 4; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int>
void wgmma_wait() {}

template <int J>
void wgmma_s8(int (&c)[J][4], const uint32_t (&a)[4], uint64_t b) {
    struct Mine {
        int (*c)[4];
        const uint32_t* a;
        uint64_t b;
    } mine{c, a, b};
    auto* block = emulated::block;
    emulated::meet(block->groups[block->current / 128], block->current % 128, 128, &mine, "wgmma", [](void** all) {
        static thread_local int A[64][32], B[8 * J][32];
        for (int thread = 0; thread < 128; ++thread)
            for (int r = 0; r < 4; ++r)
                for (int i = 0; i < 4; ++i) {
                    const cuda::Cell at = cuda::a_cell(8, thread % 32, r, i);
                    A[thread / 32 * 16 + at.row][at.column] =
                        emulated::signed_element(static_cast<Mine*>(all[thread])->a[r], 8, i);
                }
        const uint64_t start = static_cast<Mine*>(all[0])->b << 4;
        for (int row = 0; row < 8 * J; ++row)
            for (int k = 0; k < 32; ++k) {
                const uint64_t linear = start + static_cast<uint64_t>(row / 8 * 1024 + row % 8 * 128 + k);
                B[row][k] = *reinterpret_cast<const int8_t*>(linear ^ (linear >> 7 & 7) << 4);
            }
        for (int thread = 0; thread < 128; ++thread)
            for (int j = 0; j < J; ++j)
                for (int r = 0; r < 4; ++r) {
                    const cuda::Cell at = cuda::c_cell(thread % 32, r);
                    int sum = 0;
                    for (int k = 0; k < 32; ++k) sum += A[thread / 32 * 16 + at.row][k] * B[8 * j + at.column][k];
                    static_cast<Mine*>(all[thread])->c[j][r] += sum;
                }
    });
}

}  // namespace qexp::simt
