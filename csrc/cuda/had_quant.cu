// Chooses how many rows a block takes, and the kernel by the type of x.
#include "had_quant.cuh"
#include "products.cuh"

namespace qexp::cuda {
namespace {

constexpr int kUnit = 32, kLongestRow = 1024 * kUnit, kLargestOrder = 256;

// Whole blocks of threads for short rows: at least 128 units of 32 elements where there are as many rows.
int rows_in_block(const QexpRotation& r) {
    const int64_t fill = 128 * kUnit / r.n, rows = fill < r.rows ? fill : r.rows;
    return rows > 1 ? static_cast<int>(rows) : 1;
}

int log2_of(int value) {
    int power = 0;
    while (1 << power < value) ++power;
    return power;
}

bool covered(const QexpRotation& r) {
    const int size = r.order > 0 ? r.width / r.order : 0;
    const bool shape = r.n % kUnit == 0 && r.n <= kLongestRow && size > 0 && (size & (size - 1)) == 0;
    const bool groups =
        r.group % kUnit == 0 && r.sum_group % kUnit == 0 && r.n % r.group == 0 && r.n % r.sum_group == 0;
    // The factor's columns are taken eight at a time, its products are exact for 16-bit x only.
    const bool dense = r.order == 1 || (size >= 8 && r.order <= kLargestOrder && r.x_type != QEXP_F32);
    return shape && groups && dense && r.width == r.order * size && r.n % r.width == 0;
}

template <bool quantize>
int start(const QexpRotation& r, void* stream) {
    const RotationArgs args{r, rows_in_block(r), log2_of(r.width / r.order)};
    const RotationPlan plan(args);
    const int64_t blocks = (r.rows + args.rows_per_block - 1) / args.rows_per_block;
    const int threads = (plan.elements / kUnit + 31) / 32 * 32, bytes = plan.total(args);
    switch (r.x_type) {
        case QEXP_BF16:
            return simt::launch<RotationKernel<QEXP_BF16, quantize>>(blocks, 1, threads, bytes, stream, args);
        case QEXP_F16: return simt::launch<RotationKernel<QEXP_F16, quantize>>(blocks, 1, threads, bytes, stream, args);
        case QEXP_F32: return simt::launch<RotationKernel<QEXP_F32, quantize>>(blocks, 1, threads, bytes, stream, args);
        default: return QEXP_UNSUPPORTED;
    }
}

}  // namespace

int run_rotation(const QexpRotation& rotation, bool quantize, void* stream) {
    if (!covered(rotation)) return QEXP_UNSUPPORTED;
    return quantize ? start<true>(rotation, stream) : start<false>(rotation, stream);
}

}  // namespace qexp::cuda
