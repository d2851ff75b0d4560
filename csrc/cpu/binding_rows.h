// A tensor [..., n] as rows with one stride between them, for ops that work row by row.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "binding.h"
#include "hadamard.h"

namespace qexp {

struct Rows {
    at::Tensor kept;  // the tensor itself, or a contiguous copy where the outer strides are not one stride
    int64_t count, n, stride;
    Dtype dtype;

    const void* data() const { return kept.const_data_ptr(); }
};

inline Dtype dtype_of(at::ScalarType type, const char* name) {
    switch (type) {
        case at::kFloat:
            return Dtype::fp32;
        case at::kBFloat16:
            return Dtype::bf16;
        case at::kHalf:
            return Dtype::fp16;
        default:
            TORCH_CHECK(false, name, ": got ", type, ", expected bfloat16, float16 or float32");
    }
}

// Whether all dimensions but the last can be walked by one stride, and that stride.
inline bool one_stride(const at::Tensor& x, int64_t& stride) {
    const int64_t last = x.dim() - 1;
    if (x.size(last) > 1 && x.stride(last) != 1) return false;
    int64_t span = -1;  // elements that the dimensions seen so far cover, from the inside out
    for (int64_t d = last - 1; d >= 0; --d) {
        if (x.size(d) == 1) continue;
        if (span < 0) {
            stride = x.stride(d);
        } else if (x.stride(d) != span) {
            return false;
        }
        span = x.stride(d) * x.size(d);
    }
    return true;
}

inline Rows rows_of(const at::Tensor& x, const char* name) {
    const Dtype dtype = dtype_of(x.scalar_type(), name);
    TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, name, ": got shape ", x.sizes(), ", expected [..., n], n >= 1");
    const int64_t n = x.size(-1);
    int64_t stride = n;
    if (one_stride(x, stride)) return {x, x.numel() / n, n, stride, dtype};
    return {x.contiguous(), x.numel() / n, n, n, dtype};
}

}  // namespace qexp
