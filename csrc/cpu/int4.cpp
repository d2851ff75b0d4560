#include "int4.h"

#include <atomic>

namespace qexp {
namespace {

constexpr int64_t kGrain = 1 << 16;  // bytes: about 20 us

// One pass packs and looks for strays: 0 when every value fits.
uint8_t pack_range(const int8_t* q, uint8_t* packed, int64_t begin, int64_t end) {
    uint8_t strays = 0;
    for (int64_t j = begin; j < end; ++j) {
        const uint8_t low = static_cast<uint8_t>(q[2 * j]), high = static_cast<uint8_t>(q[2 * j + 1]);
        strays |= static_cast<uint8_t>((low + 8) | (high + 8)) & 0xF0;  // -8..7 moves to 0..15, all else sets a high bit
        packed[j] = static_cast<uint8_t>((low & 15) | (high << 4));
    }
    return strays;
}

}  // namespace

bool pack_int4(const int8_t* q, uint8_t* packed, int64_t count, ParallelFor loop) {
    std::atomic<int> strays{0};
    split(loop, count / 2, kGrain, [&](int64_t begin, int64_t end) {
        if (pack_range(q, packed, begin, end) != 0) strays.store(1, std::memory_order_relaxed);
    });
    return strays.load() == 0;
}

void unpack_int4(const uint8_t* packed, int8_t* q, int64_t bytes, ParallelFor loop) {
    split(loop, bytes, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
            q[2 * j] = static_cast<int8_t>(static_cast<int8_t>(packed[j] << 4) >> 4);
            q[2 * j + 1] = static_cast<int8_t>(static_cast<int8_t>(packed[j]) >> 4);
        }
    });
}

}  // namespace qexp
