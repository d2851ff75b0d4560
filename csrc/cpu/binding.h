// What the torch bindings share: the lent parallel loop and the checks that every op makes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace qexp {

// torch's own threads as a ParallelFor; inline inside another parallel region, so there is no nesting. at::parallel_for
// itself is a template that runs on one thread unless this file is built with the OpenMP that torch was built with, which
// not every compiler has; the loop of a TensorIterator is compiled inside libtorch. Its bytes only carry the index.
inline void torch_parallel(int64_t count, int64_t grain, Task task, void* context) {
    if (count <= std::max<int64_t>(grain, 1) || at::get_num_threads() == 1) return task(context, 0, count);
    const at::Tensor places = at::empty({count}, at::kByte);
    const char* origin = static_cast<const char*>(places.const_data_ptr());
    auto loop = at::TensorIteratorConfig().add_const_input(places).build();
    const auto range = [=](char** data, const int64_t*, int64_t size, int64_t repeats) {
        const int64_t begin = data[0] - origin;
        task(context, begin, begin + size * repeats);
    };
    loop.for_each(range, grain);
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
