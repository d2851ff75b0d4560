// Chooses the tile kernel for a product: 64 or 128 tokens a block, and how scales are applied.
#include "products.cuh"
#include "w4_tile.cuh"

namespace qexp::cuda {
namespace {

template <int tokens, Scales scales, bool native_s4>
int start(const Product& p, void* stream) {
    using Kernel = W4Tile<tokens, scales, native_s4>;
    const int64_t across = (p.n + Kernel::kFeatures - 1) / Kernel::kFeatures, down = (p.m + tokens - 1) / tokens;
    return simt::launch<Kernel>(across, down, Kernel::threads, Kernel::shared_bytes(p.out_type), stream, p);
}

template <Scales scales, bool native_s4 = false>
int sized(const Product& p, void* stream) {
    return p.m <= 64 ? start<64, scales, native_s4>(p, stream) : start<128, scales, native_s4>(p, stream);
}

}  // namespace

int run_tile(const Product& p, void* stream) {
    if (p.out_type == QEXP_I32 || p.group == 0) return sized<Scales::channel>(p, stream);
    if (p.inner != nullptr) return p.group % 64 == 0 ? sized<Scales::two_level>(p, stream) : QEXP_UNSUPPORTED;
    return p.group % 64 == 0 ? sized<Scales::group>(p, stream) : sized<Scales::fine>(p, stream);
}

int run_tile_s4(const Product& p, void* stream) {
#if defined(__CUDACC__) && !defined(QEXP_EMULATED_S4)
    if (simt::compute_capability() >= 90) return QEXP_UNSUPPORTED;
#endif
    if (p.inner != nullptr) return QEXP_UNSUPPORTED;
    if (p.out_type == QEXP_I32 || p.group == 0) return sized<Scales::channel, true>(p, stream);
    return p.group % 64 == 0 ? sized<Scales::group, true>(p, stream) : QEXP_UNSUPPORTED;
}

}  // namespace qexp::cuda
