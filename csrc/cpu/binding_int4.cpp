#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "binding.h"
#include "int4.h"

namespace qexp {
namespace {

at::Tensor empty_like_last(const at::Tensor& x, int64_t last, at::ScalarType dtype) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = last;
    return at::empty(shape, x.options().dtype(dtype));
}

at::Tensor pack_int4_cpu(const at::Tensor& q) {
    check_dtype(q, "q", at::kChar);
    TORCH_CHECK(q.dim() >= 1 && q.size(-1) % 2 == 0, "q: got shape ", q.sizes(), ", expected [..., K] with even K");
    const at::Tensor dense = q.contiguous();
    at::Tensor packed = empty_like_last(q, q.size(-1) / 2, at::kByte);
    const bool fits = pack_int4(dense.const_data_ptr<int8_t>(), packed.mutable_data_ptr<uint8_t>(), dense.numel(),
                                torch_parallel);
    TORCH_CHECK(fits, "q: got values outside -8..7, expected signed 4-bit values");
    return packed;
}

at::Tensor unpack_int4_cpu(const at::Tensor& packed) {
    check_dtype(packed, "packed", at::kByte);
    TORCH_CHECK(packed.dim() >= 1, "packed: got a scalar, expected [..., K / 2]");
    const at::Tensor dense = packed.contiguous();
    at::Tensor q = empty_like_last(packed, 2 * packed.size(-1), at::kChar);
    unpack_int4(dense.const_data_ptr<uint8_t>(), q.mutable_data_ptr<int8_t>(), dense.numel(), torch_parallel);
    return q;
}

}  // namespace

TORCH_LIBRARY_IMPL(qexp, CPU, m) {
    m.impl("pack_int4", pack_int4_cpu);
    m.impl("unpack_int4", unpack_int4_cpu);
}

}  // namespace qexp
