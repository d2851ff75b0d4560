#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "binding.h"
#include "sweep.h"

namespace qexp {
namespace {

void check_matrix(const at::Tensor& x, const char* name, int64_t rows, int64_t columns) {
    check_cpu(x, name);
    check_dtype(x, name, at::kFloat);
    TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, ": got shape ", x.sizes(),
                ", expected [", rows, ", ", columns, "]");
}

void check_in_place(const at::Tensor& x, const char* name, int64_t row_stride) {
    TORCH_CHECK(x.stride(1) == 1 && x.stride(0) == row_stride, name, ": got strides ", x.strides(), ", expected [",
                row_stride, ", 1]: it is changed in place");
}

at::Tensor sweep_columns_cpu(at::Tensor& target, at::Tensor& error, const at::Tensor& mix, const at::Tensor& scale,
                             const at::Tensor& zero, int64_t top) {
    TORCH_CHECK(target.dim() == 2, "target: got shape ", target.sizes(), ", expected [J, O]");
    const int64_t columns = target.size(0), rows = target.size(1);
    check_matrix(target, "target", columns, rows);
    check_matrix(error, "error", columns, rows);
    check_matrix(mix, "mix", columns, columns);
    check_matrix(scale, "scale", columns, rows);
    check_matrix(zero, "zero", columns, rows);
    check_in_place(target, "target", target.stride(0));
    check_in_place(error, "error", target.stride(0));
    TORCH_CHECK(top >= 1 && top <= 255, "top: got ", top, ", expected 1..255");
    const at::Tensor shares = mix.contiguous(), scales = scale.contiguous(), zeros = zero.contiguous();
    at::Tensor codes = at::empty({columns, rows}, target.options().dtype(at::kByte));
    sweep_columns({target.mutable_data_ptr<float>(), error.mutable_data_ptr<float>(), shares.const_data_ptr<float>(),
                   scales.const_data_ptr<float>(), zeros.const_data_ptr<float>(), codes.mutable_data_ptr<uint8_t>(),
                   columns, rows, target.stride(0), columns, static_cast<float>(top)},
                  torch_parallel);
    return codes;
}

}  // namespace

TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("sweep_columns", sweep_columns_cpu); }

}  // namespace qexp
