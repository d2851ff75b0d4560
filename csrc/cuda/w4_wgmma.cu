// Chooses the wgmma kernel for a product. Compiled for sm_90a alone; a library without that architecture is built with
// QEXP_WITHOUT_SM90A and says that there is no such kernel.
#include "products.cuh"
#if !defined(QEXP_WITHOUT_SM90A)
#include "w4_wgmma.cuh"
#endif

namespace qexp::cuda {
namespace {

#if !defined(QEXP_WITHOUT_SM90A)
template <int tokens, WgmmaScales scales>
int start(const Product& p, void* stream) {
    using Kernel = W4Wgmma<tokens, scales>;
    WgmmaArgs args{p, {}};
    const int error = simt::describe(&args.activations, p.a, p.m, p.k, p.a_stride, tokens);
    if (error != 0) return error;
    const int64_t across = (p.n + Kernel::kFeatures - 1) / Kernel::kFeatures, down = (p.m + tokens - 1) / tokens;
    return simt::launch<Kernel>(across, down, Kernel::threads, Kernel::kSharedBytes, stream, args);
}
#endif

}  // namespace

int run_wgmma(const QexpProduct& p, void* stream) {
#if !defined(QEXP_WITHOUT_SM90A)
    if (simt::compute_capability() != 90) return QEXP_UNSUPPORTED;
    if (p.out_type == QEXP_I32 || p.group == 0) {
        return p.m <= 128 ? start<128, WgmmaScales::channel>(p, stream) : start<256, WgmmaScales::channel>(p, stream);
    }
    if (p.group % kTileColumns != 0) return QEXP_UNSUPPORTED;
    if (p.inner != nullptr) {
        return p.m <= 128 ? start<128, WgmmaScales::two_level>(p, stream)
                          : start<256, WgmmaScales::two_level>(p, stream);
    }
    return start<128, WgmmaScales::group>(p, stream);
#else
    static_cast<void>(p), static_cast<void>(stream);
    return QEXP_UNSUPPORTED;
#endif
}

}  // namespace qexp::cuda
