// What the torch bindings share: the lent parallel loop and the checks that every op makes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "parallel.h"

namespace qexp {

// at::parallel_for as a ParallelFor: runs inline inside another parallel region, so there is no nesting.
inline void torch_parallel(int64_t count, int64_t grain, Task task, void* context) {
    at::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { task(context, begin, end); });
}

// Ops without a derivative refuse to be silently constant.
inline void check_no_grad(const at::Tensor& x, const char* name) {
    TORCH_CHECK(!(x.requires_grad() && at::GradMode::is_enabled()), name,
                ": got a tensor that requires a gradient, expected none: this op has no derivative; call it under "
                "torch.no_grad()");
}

inline void check_cpu(const at::Tensor& x, const char* name) {
    TORCH_CHECK(x.device().is_cpu(), name, ": got device ", x.device(), ", expected cpu like the other arguments");
}

inline void check_dtype(const at::Tensor& x, const char* name, at::ScalarType expected) {
    TORCH_CHECK(x.scalar_type() == expected, name, ": got ", x.scalar_type(), ", expected ", expected);
}

}  // namespace qexp
