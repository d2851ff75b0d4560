// The C ABI: argument plumbing and the small repacking kernels.
#include "products.cuh"
#include "repack.cuh"

#ifndef QEXP_CUDA_ARCHS
#define QEXP_CUDA_ARCHS "emulated"
#endif

namespace qexp::cuda {
namespace {

// Products beyond this many inputs could leave int32: |sum| <= 16 * 8 * 128 * k.
constexpr int kLargestDepth = 131072;

template <class Kernel>
int repack(const uint8_t* from, void* to, int rows, int columns, int64_t jobs, void* stream) {
    if (jobs == 0) return 0;
    const Repack args{from, static_cast<uint8_t*>(to), rows, columns, jobs};
    return simt::launch<Kernel>((jobs + Kernel::threads - 1) / Kernel::threads, 1, Kernel::threads, 0, stream, args);
}

int64_t tiles_across(int columns) { return (columns + kTileColumns - 1) / kTileColumns; }

bool covered(const QexpProduct& p) {
    const bool grouped = p.group == 0 || (p.group % 32 == 0 && p.k % p.group == 0);
    return grouped && p.k > 0 && p.k < kLargestDepth && p.a_stride % 16 == 0;
}

}  // namespace
}  // namespace qexp::cuda

using namespace qexp::cuda;

const char* qexp_cuda_archs(void) { return QEXP_CUDA_ARCHS; }

const char* qexp_cuda_error(int code) {
#if defined(__CUDACC__)
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
    return code == 0 ? "no error" : "unknown";
#endif
}

int qexp_prepack_w4(const uint8_t* canonical, int32_t n, int32_t k, uint8_t* packed, void* stream) {
    const int64_t rows = (n + kRowPadding - 1) / kRowPadding * (kRowPadding / kTileRows);
    return repack<Prepack>(canonical, packed, n, k, rows * tiles_across(k) * 32, stream);
}

int qexp_unprepack_w4(const uint8_t* packed, int32_t n, int32_t k, uint8_t* canonical, void* stream) {
    return repack<Unprepack>(packed, canonical, n, k, static_cast<int64_t>(n) * (k / 2), stream);
}

int qexp_expand_a4(const uint8_t* nibbles, int32_t m, int32_t k, int8_t* out, void* stream) {
    return repack<Expand>(nibbles, out, m, k, m * tiles_across(k) * 8, stream);
}

int qexp_reorder_a4(const uint8_t* nibbles, int32_t m, int32_t k, uint8_t* out, void* stream) {
    return repack<Reorder>(nibbles, out, m, k, m * tiles_across(k) * 8, stream);
}

int qexp_dequantize_w4(const QexpProduct* p, void* stream) {
    const int64_t jobs = (p->n + kTileRows - 1) / kTileRows * tiles_across(p->k) * 32;
    const Dequantize args{p->w, p->scale, p->inner, p->zero, p->out, p->n, p->k, p->group, p->out_type, jobs};
    constexpr int kThreads = DequantizeKernel::threads;
    return qexp::simt::launch<DequantizeKernel>((jobs + kThreads - 1) / kThreads, 1, kThreads, 0, stream, args);
}

int qexp_w4a8(const QexpProduct* product, int kernel, void* stream) {
    if (!covered(*product)) return QEXP_UNSUPPORTED;
    if (product->m == 0 || product->n == 0) return 0;
    switch (kernel) {
        case QEXP_TILE: return run_tile(*product, stream);
        case QEXP_TILE_S4: return run_tile_s4(*product, stream);
        case QEXP_DECODE: return run_decode(*product, stream);
        case QEXP_WGMMA: return run_wgmma(*product, stream);
        default: return QEXP_UNSUPPORTED;
    }
}

int qexp_w4a16(const QexpProduct* product, void* stream) {
    if (!covered(*product)) return QEXP_UNSUPPORTED;
    if (product->m == 0 || product->n == 0) return 0;
    return product->a_type == QEXP_BF16 ? run_decode_bf16(*product, stream) : run_decode_half(*product, stream);
}

int qexp_hadamard(const QexpRotation* rotation, void* stream) {
    return rotation->rows == 0 ? 0 : run_rotation(*rotation, false, stream);
}

int qexp_had_quant(const QexpRotation* rotation, void* stream) {
    return rotation->rows == 0 ? 0 : run_rotation(*rotation, true, stream);
}
