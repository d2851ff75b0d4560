// The host's stand-in for a GPU: every thread of a block is a fiber, warps meet for collective instructions.
//
// It follows the PTX ISA, not a particular chip: operand fragments come from layout.h, asynchronous copies land only
// when they are waited for, shared memory starts poisoned, and a block in which nobody can go on is reported as a
// deadlock. QEXP_EMULATOR_ORDER=1 runs the lanes backwards: a result that depends on the order is a race.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#include "layout.h"

#define QEXP_DEVICE inline
#define QEXP_UNROLL
#define QEXP_NO_UNROLL
#define QEXP_NATIVE_S4 1

namespace qexp::simt {

struct alignas(16) Words4 {
    uint32_t word[4];
};
struct alignas(8) Words2 {
    uint32_t word[2];
};

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "qexp emulator: %s\n", what);
    std::abort();
}

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    std::vector<Copy> open;                 // copies issued, not yet committed
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// Where a fixed number of threads meet; the last one to arrive does the work for all.
struct Meeting {
    int arrived = 0;
    uint64_t round = 0;
    const char* name = nullptr;
    void* operands[128] = {};
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps, groups;  // of 32, and of 128 threads (warpgroups)
    Meeting barrier, named[16];
    ucontext_t scheduler;
    std::function<void()> body;
    int current = 0, x = 0, y = 0, grid_x = 1;
    uint64_t progress = 0;
    bool moved = true;  // the current fiber went on since it was resumed
};

inline Block* block = nullptr;

inline void yield() {
    Fiber& self = block->fibers[block->current];
    swapcontext(&self.context, &block->scheduler);
}

// Waits until `ready`; the scheduler sees whether anyone could go on.
template <class Ready>
void wait_until(Ready ready) {
    while (!ready()) {
        block->moved = false;
        yield();
    }
    block->moved = true;
    ++block->progress;
}

template <class Work>
void meet(Meeting& meeting, int slot, int count, void* operands, const char* name, Work work) {
    if (meeting.arrived == 0) meeting.name = name;
    if (std::strcmp(meeting.name, name) != 0) fail("threads of one group meet in different instructions");
    meeting.operands[slot] = operands;
    const uint64_t round = meeting.round;
    ++block->progress;
    if (++meeting.arrived == count) {
        work(meeting.operands);
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    wait_until([&] { return meeting.round != round; });
}

inline int lane() { return block->current % 32; }

template <class Work>
void in_warp(void* operands, const char* name, Work work) {
    meet(block->warps[block->current / 32], lane(), 32, operands, name, work);
}

inline void land(std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        if (copy.valid)
            std::memcpy(copy.to, copy.from, 16);
        else
            std::memset(copy.to, 0, 16);
    }
    copies.clear();
}

inline void trampoline() {
    block->body();
    Fiber& self = block->fibers[block->current];
    for (const auto& group : self.groups)
        for (const Copy& copy : group)
            if (copy.valid) fail("a thread ended with copies in flight");
    self.done = true;
    ++block->progress;
    swapcontext(&self.context, &block->scheduler);
}

inline void start(Fiber& fiber) {
    constexpr size_t kStack = 128 * 1024;
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, trampoline, 0);
}

inline void run_block(Block& self, int threads, const std::function<void()>& body) {
    if (threads % 32 != 0) fail("a block must be whole warps");
    self.fibers = std::vector<Fiber>(threads);
    self.warps = std::vector<Meeting>(threads / 32);
    self.groups = std::vector<Meeting>((threads + 127) / 128);
    self.body = body;
    block = &self;
    for (Fiber& fiber : self.fibers) start(fiber);
    const char* order = std::getenv("QEXP_EMULATOR_ORDER");
    const bool backwards = order != nullptr && order[0] == '1';
    for (int live = threads; live > 0;) {
        const uint64_t before = self.progress;
        live = 0;
        for (int i = 0; i < threads; ++i) {
            self.current = backwards ? threads - 1 - i : i;
            Fiber& fiber = self.fibers[self.current];
            if (fiber.done) continue;
            swapcontext(&self.scheduler, &fiber.context);
            live += fiber.done ? 0 : 1;
        }
        if (live > 0 && self.progress == before) fail("deadlock: no thread of the block can go on");
    }
    block = nullptr;
}

}  // namespace emulated

inline int thread() { return emulated::block->current; }
inline int block_x() { return emulated::block->x; }
inline int block_y() { return emulated::block->y; }
inline int grid_x() { return emulated::block->grid_x; }
inline void sync() {
    auto* block = emulated::block;
    emulated::meet(block->barrier, 0, static_cast<int>(block->fibers.size()), nullptr, "barrier", [](void**) {});
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float from_bf16(uint32_t low) { return float_of(low << 16); }
inline float from_half(uint32_t low) {
    const uint16_t bits = static_cast<uint16_t>(low);
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}
inline uint32_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
    return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}
inline uint32_t to_half(float value) {
    const _Float16 rounded = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
}
inline uint32_t to_bf16x2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline uint32_t to_half2(float low, float high) { return to_half(low) | to_half(high) << 16; }
inline uint32_t subtract_bf16x2(uint32_t a, uint32_t b) {
    const uint32_t low = to_bf16(from_bf16(a & 0xFFFFu) - from_bf16(b & 0xFFFFu));
    return low | to_bf16(from_bf16(a >> 16) - from_bf16(b >> 16)) << 16;
}
inline uint32_t subtract_half2(uint32_t a, uint32_t b) {
    const uint32_t low = to_half(from_half(a) - from_half(b));
    return low | to_half(from_half(a >> 16) - from_half(b >> 16)) << 16;
}
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t pick) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(bytes >> (8 * (pick >> (4 * i) & 7)) & 0xFF) << (8 * i);
    return picked;
}

inline uint32_t shuffle(uint32_t value, int lane) {
    struct Ask {
        uint32_t value;
        int lane;
        uint32_t answer;
    } ask{value, lane & 31, 0};
    emulated::in_warp(&ask, "shuffle", [](void** all) {
        for (int i = 0; i < 32; ++i) {
            Ask& mine = *static_cast<Ask*>(all[i]);
            mine.answer = static_cast<Ask*>(all[mine.lane])->value;
        }
    });
    return ask.answer;
}
template <class T, class Combine>
T reduce(T value, const char* name, Combine combine) {
    emulated::in_warp(&value, name, [&](void** all) {
        T total = *static_cast<T*>(all[0]);
        for (int i = 1; i < 32; ++i) total = combine(total, *static_cast<T*>(all[i]));
        for (int i = 0; i < 32; ++i) *static_cast<T*>(all[i]) = total;
    });
    return value;
}
inline uint32_t reduce_max(uint32_t value) {
    return reduce(value, "reduce_max", [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline int reduce_add(int value) {
    return reduce(value, "reduce_add", [](int a, int b) { return a + b; });
}
inline void atomic_max(uint32_t* shared, uint32_t value) { *shared = *shared > value ? *shared : value; }
inline void atomic_add(int* shared, int value) { *shared += value; }

inline void copy_async(void* to, const void* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
        emulated::fail("a 16-byte copy is not aligned");
    emulated::block->fibers[emulated::block->current].open.push_back({to, from, valid});
}
inline void copy_commit() {
    auto& self = emulated::block->fibers[emulated::block->current];
    self.groups.push_back(std::move(self.open));
    self.open.clear();
}
template <int newest>
void copy_wait() {
    auto& groups = emulated::block->fibers[emulated::block->current].groups;
    while (static_cast<int>(groups.size()) > newest) {
        emulated::land(groups.front());
        groups.erase(groups.begin());
    }
}

template <class T>
T load(const T* from) {
    if (reinterpret_cast<uintptr_t>(from) % alignof(T)) emulated::fail("a load is not aligned");
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline Words4 load_once(const void* from) { return load(static_cast<const Words4*>(from)); }

namespace emulated {

struct Matrices {
    uint32_t* r;
    const void* row;
};

// Row i of matrix m is 16 bytes at the address of lane 8 m + i; lane l gets elements 2 (l % 4), + 1 of row l / 4.
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row is not aligned");
    Matrices mine{r, row};
    in_warp(&mine, transposed ? "ldmatrix.trans" : "ldmatrix", [&](void** all) {
        uint16_t matrix[4][8][8];
        for (int i = 0; i < 32; ++i) std::memcpy(matrix[i / 8][i % 8], static_cast<Matrices*>(all[i])->row, 16);
        for (int i = 0; i < 32; ++i)
            for (int m = 0; m < 4; ++m) {
                const int row = i / 4, column = 2 * (i % 4);
                const uint32_t low = transposed ? matrix[m][column][row] : matrix[m][row][column];
                const uint32_t high = transposed ? matrix[m][column + 1][row] : matrix[m][row][column + 1];
                static_cast<Matrices*>(all[i])->r[m] = low | high << 16;
            }
    });
}

template <class C>
struct Product {
    C* c;
    const uint32_t* a;
    uint32_t b[2];
};

inline int signed_element(uint32_t word, int bits, int i) {
    return static_cast<int>(word << (32 - bits * (i + 1))) >> (32 - bits);
}

// One tensor-core instruction: gathers the operands of all lanes into matrices, multiplies, scatters the result.
template <int bits, class C, class Decode>
void mma(C (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* name, Decode decode) {
    Product<C> mine{c, a, {b0, b1}};
    in_warp(&mine, name, [&](void** all) {
        constexpr int kEach = 32 / bits, kDepth = 8 * kEach;
        static thread_local C A[16][kDepth], B[8][kDepth];
        for (int lane = 0; lane < 32; ++lane) {
            const auto& from = *static_cast<Product<C>*>(all[lane]);
            for (int r = 0; r < 4; ++r)
                for (int i = 0; i < kEach; ++i) {
                    const cuda::Cell at = cuda::a_cell(bits, lane, r, i);
                    A[at.row][at.column] = decode(from.a[r], i);
                }
            for (int r = 0; r < 2; ++r)
                for (int i = 0; i < kEach; ++i) {
                    const cuda::Cell at = cuda::b_cell(bits, lane, r, i);
                    B[at.column][at.row] = decode(from.b[r], i);
                }
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < 4; ++r) {
                const cuda::Cell at = cuda::c_cell(lane, r);
                C sum = 0;
                for (int k = 0; k < kDepth; ++k) sum += A[at.row][k] * B[at.column][k];
                static_cast<Product<C>*>(all[lane])->c[r] += sum;
            }
    });
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulated::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulated::load_matrices(r, row, true); }
inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated::mma<8>(c, a, b0, b1, "mma.s8", [](uint32_t w, int i) { return emulated::signed_element(w, 8, i); });
}
inline void mma_s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated::mma<4>(c, a, b0, b1, "mma.s4", [](uint32_t w, int i) { return emulated::signed_element(w, 4, i); });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated::mma<16>(c, a, b0, b1, "mma.bf16", [](uint32_t w, int i) { return from_bf16(w >> (16 * i) & 0xFFFFu); });
}
inline void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated::mma<16>(c, a, b0, b1, "mma.half", [](uint32_t w, int i) { return from_half(w >> (16 * i) & 0xFFFFu); });
}

inline int compute_capability() { return 90; }

// Runs a kernel block after block; the error is always 0, what is wrong aborts with a message.
template <class Kernel>
int launch(int64_t grid_x, int64_t grid_y, int threads, int shared_bytes, void*, const typename Kernel::Args& args) {
    if (threads > Kernel::threads) emulated::fail("the block does not fit");
    if (shared_bytes > 227 * 1024) return -1;
    for (int64_t y = 0; y < grid_y; ++y)
        for (int64_t x = 0; x < grid_x; ++x) {
            // No more bytes than asked for (and one, so that none is not null), so that AddressSanitizer sees an access
            // past the end.
            void* shared = nullptr;
            if (posix_memalign(&shared, 1024, static_cast<size_t>(shared_bytes) + 1) != 0) emulated::fail("no memory");
            std::memset(shared, 0xA5, static_cast<size_t>(shared_bytes));
            emulated::Block self;
            self.x = static_cast<int>(x), self.y = static_cast<int>(y), self.grid_x = static_cast<int>(grid_x);
            emulated::run_block(self, threads, [&] { Kernel::run(args, shared); });
            std::free(shared);
        }
    return 0;
}

}  // namespace qexp::simt
