#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "binding.h"
#include "gram.h"

namespace qexp {
namespace {

at::Tensor gram_cpu(const at::Tensor& x) {
    check_no_grad(x, "gram");
    TORCH_CHECK(x.dim() == 2, "x: got shape ", x.sizes(), ", expected [T, I]");
    const bool wide = x.scalar_type() == at::kFloat;
    TORCH_CHECK(wide || x.scalar_type() == at::kBFloat16, "x: got ", x.scalar_type(), ", expected float32 or bfloat16");
    const at::Tensor dense = x.contiguous();
    at::Tensor out = at::empty({x.size(1), x.size(1)}, x.options().dtype(at::kFloat));
    gram(dense.const_data_ptr(), wide ? GramInput::fp32 : GramInput::bf16, x.size(0), x.size(1),
         out.mutable_data_ptr<float>(), torch_parallel);
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("gram", gram_cpu); }

}  // namespace qexp
