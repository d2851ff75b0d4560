// Prints what NVIDIA's own headers (CUTLASS, CuTe) say of the operand registers that csrc/cuda/layout.h describes, and
// fails where the two differ: "name: ok" a line.
#include <cstdio>

#include "layout.h"

#include <cute/tensor.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

using namespace cute;
using qexp::cuda::Cell;

// A CuTe layout maps (thread, value) to row + rows * column.
template <class Layout, class Expected>
bool same(const char* name, Layout layout, int threads, int values, int rows, Expected expected) {
    for (int t = 0; t < threads; ++t)
        for (int v = 0; v < values; ++v) {
            const int index = static_cast<int>(layout(t, v));
            const Cell cell = expected(t, v);
            if (index % rows != cell.row || index / rows != cell.column) {
                std::printf("%s: thread %d value %d is (%d, %d), expected (%d, %d)\n", name, t, v, index % rows,
                            index / rows, cell.row, cell.column);
                return false;
            }
        }
    std::printf("%s: ok\n", name);
    return true;
}

template <class Atom, int bits>
bool mma(const char* name) {
    using Traits = MMA_Traits<Atom>;
    constexpr int each = 32 / bits;
    const auto a = [](int t, int v) { return qexp::cuda::a_cell(bits, t, v / each, v % each); };
    const auto b = [](int t, int v) {
        const Cell cell = qexp::cuda::b_cell(bits, t, v / each, v % each);
        return Cell{cell.column, cell.row};  // CuTe gives B as (n, k)
    };
    const auto c = [](int t, int v) { return qexp::cuda::c_cell(t, v); };
    std::printf("%s\n", name);
    return same("  A", typename Traits::ALayout{}, 32, 4 * each, 16, a) &
           same("  B", typename Traits::BLayout{}, 32, 2 * each, 8, b) &
           same("  C", typename Traits::CLayout{}, 32, 4, 16, c);
}

int main() {
    bool good = mma<SM80_16x8x32_S32S8S8S32_TN, 8>("mma s8") & mma<SM80_16x8x64_S32S4S4S32_TN, 4>("mma s4") &
                mma<SM80_16x8x16_F32BF16BF16F32_TN, 16>("mma bf16") & mma<SM80_16x8x16_F32F16F16F32_TN, 16>("mma f16");
    using Wide = MMA_Traits<SM90::GMMA::MMA_64x256x32_S32S8S8_RS_TN>;
    const auto a = [](int t, int v) {
        const Cell cell = qexp::cuda::a_cell(8, t % 32, v / 4, v % 4);
        return Cell{cell.row + t / 32 * 16, cell.column};
    };
    const auto c = [](int t, int v) {
        const Cell cell = qexp::cuda::c_cell(t % 32, v % 4);
        return Cell{cell.row + t / 32 * 16, cell.column + v / 4 * 8};
    };
    good &= same("wgmma A", Wide::ALayout{}, 128, 16, 64, a) & same("wgmma C", Wide::CLayout{}, 128, 128, 64, c);
    // The 128-byte swizzle of shared memory, on byte offsets.
    bool swizzle = true;
    for (int offset = 0; offset < 8192; ++offset)
        swizzle &=
            Swizzle<3, 4, 3>{}(offset) == qexp::cuda::chunk_in_128(offset / 128, offset % 128 / 16) + offset % 16;
    std::printf("swizzle: %s\n", swizzle ? "ok" : "differs");
    return good && swizzle ? 0 : 1;
}
