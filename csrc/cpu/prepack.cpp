#include <cstring>

#include "p16k8.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qexp {
namespace {

// One canonical byte is two neighbouring k; both come out as code + 8, and xor 8 adds 8 to a two's complement nibble.
void scatter_row(const uint8_t* row, int64_t k, int64_t column, uint8_t* blocks) {
    for (int64_t step = 0; step < k_steps(k); ++step) {
        uint8_t* place = blocks + step * kBlockBytes + column * 4;
        uint8_t source[4] = {0, 0, 0, 0};  // canonical zeros become the padding
        const int64_t left = (k - step * kBlockSteps) / 2;
        std::memcpy(source, row + step * 4, static_cast<size_t>(left < 4 ? left : 4));
        for (int j = 0; j < 4; ++j) {
            const int low = (source[j / 2] >> (4 * (j % 2))) & 15, high = (source[2 + j / 2] >> (4 * (j % 2))) & 15;
            place[j] = static_cast<uint8_t>((low | (high << 4)) ^ 0x88);
        }
    }
}

void pad_column(int64_t steps, int64_t column, uint8_t* blocks) {
    for (int64_t step = 0; step < steps; ++step) std::memset(blocks + step * kBlockBytes + column * 4, 0x88, 4);
}

}  // namespace

void prepack_p16k8(const uint8_t* canonical, int64_t n, int64_t k, int64_t group, uint8_t* packed, ParallelFor loop) {
    const W4Header header = {{'Q', 'X', 'W', '4'}, 1, kLayoutCpu, 0, n, k, group, {}};
    std::memcpy(packed, &header, sizeof header);
    const int64_t steps = k_steps(k);
    split(loop, column_blocks(n), 1, [&](int64_t begin, int64_t end) {
        for (int64_t column = begin * kBlockColumns; column < end * kBlockColumns; ++column) {
            uint8_t* blocks = packed + kHeaderBytes + column / kBlockColumns * steps * kBlockBytes;
            if (column < n) {
                scatter_row(canonical + column * (k / 2), k, column % kBlockColumns, blocks);
            } else {
                pad_column(steps, column % kBlockColumns, blocks);
            }
        }
    });
}

void advise_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 4096;
    constexpr int64_t kWorthwhile = 4 << 20;
    if (bytes < kWorthwhile) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) & ~(kPage - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)bytes;
#endif
}

}  // namespace qexp
