#include <torch/library.h>

#include "binding.h"
#include "gram.h"

namespace qexp {
namespace {

void gram_cpu_(at::Tensor& sum, const at::Tensor& x) {
    check_no_grad(x, "gram_");
    TORCH_CHECK(x.dim() == 2, "x: got shape ", x.sizes(), ", expected [T, I]");
    const bool wide = x.scalar_type() == at::kFloat;
    TORCH_CHECK(wide || x.scalar_type() == at::kBFloat16, "x: got ", x.scalar_type(), ", expected float32 or bfloat16");
    const int64_t columns = x.size(1);
    TORCH_CHECK(sum.scalar_type() == at::kDouble && sum.sizes() == at::IntArrayRef({columns, columns}), "sum: got ",
                sum.scalar_type(), " of shape ", sum.sizes(), ", expected float64 [", columns, ", ", columns, "]");
    TORCH_CHECK(sum.is_contiguous(), "sum: got strides ", sum.strides(), ", expected a contiguous tensor");
    const at::Tensor dense = x.contiguous();
    add_gram(dense.const_data_ptr(), wide ? GramInput::fp32 : GramInput::bf16, x.size(0), columns,
             sum.mutable_data_ptr<double>(), torch_parallel);
}

}  // namespace

TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("gram_", gram_cpu_); }

}  // namespace qexp
