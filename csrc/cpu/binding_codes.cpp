// torch.ops.qexp.quantize_codes, dequantize_codes and fake_quantize for CPU tensors.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "binding.h"
#include "binding_rows.h"
#include "codes.h"

namespace qexp {
namespace {

std::vector<int64_t> with_last(const at::Tensor& x, int64_t last) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = last;
    return shape;
}

int64_t width_of_group(int64_t group, int64_t d) {
    const int64_t width = group ? group : d;
    TORCH_CHECK(group >= 0 && width > 0 && d % width == 0, "group: got ", group,
                      ", expected 0 or a divisor of d=", d);
    return width;
}

void check_code_bits(int64_t bits) {
    TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "bits: got ", bits, ", expected 2, 4 or 8");
}

void check_clip(double clip) {
    TORCH_CHECK(clip > 0 && clip <= 1, "clip: got ", clip, ", expected a number in (0, 1]");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_codes_cpu(const at::Tensor& x, int64_t bits, int64_t group,
                                                                  bool symmetric, double clip, bool half) {
    check_no_grad(x, "x");
    check_code_bits(bits);
    check_clip(clip);
    const Rows rows = rows_of(x, "x");
    TORCH_CHECK(rows.n % 8 == 0, "x: got d=", rows.n, ", expected a multiple of 8, the codes that are packed together");
    const int64_t width = width_of_group(group, rows.n);
    at::Tensor packed = at::empty(with_last(x, rows.n * bits / 8), x.options().dtype(at::kByte));
    at::Tensor scale = at::empty(with_last(x, rows.n / width), x.options().dtype(at::kFloat));
    at::Tensor zero = at::empty(scale.sizes(), scale.options());
    const GridRule rule{static_cast<int>(bits), symmetric, false, static_cast<float>(clip), half};
    quantize_codes({rows.data(), rows.stride, rows.count, rows.n, rows.dtype, rule, width,
                    packed.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>(),
                    zero.mutable_data_ptr<float>()},
                   torch_parallel);
    return {packed, scale, zero};
}

void check_parameter(const at::Tensor& p, const char* name, const std::vector<int64_t>& shape) {
    check_cpu(p, name);
    check_dtype(p, name, at::kFloat);
    TORCH_CHECK(p.sizes() == at::IntArrayRef(shape), name, ": got shape ", p.sizes(), ", expected ",
                      at::IntArrayRef(shape));
}

at::Tensor dequantize_codes_cpu(const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& zero,
                                int64_t bits, int64_t group, at::ScalarType dtype) {
    check_code_bits(bits);
    check_dtype(packed, "packed", at::kByte);
    TORCH_CHECK(packed.dim() >= 1 && packed.size(-1) >= 1 && packed.size(-1) % bits == 0, "packed: got shape ",
                packed.sizes(), ", expected [..., d bits / 8] with 8 | d");
    const Dtype out = dtype_of(dtype, "dtype");
    const int64_t d = packed.size(-1) * 8 / bits, width = width_of_group(group, d);
    check_parameter(scale, "scale", with_last(packed, d / width));
    check_parameter(zero, "zero", with_last(packed, d / width));
    const at::Tensor codes = packed.contiguous(), s = scale.contiguous(), z = zero.contiguous();
    at::Tensor y = at::empty(with_last(packed, d), packed.options().dtype(dtype));
    dequantize_codes({codes.const_data_ptr<uint8_t>(), s.const_data_ptr<float>(), z.const_data_ptr<float>(),
                      packed.numel() / packed.size(-1), d, static_cast<int>(bits), width, out, y.mutable_data_ptr()},
                     torch_parallel);
    return y;
}

at::Tensor fake_quantize_cpu(const at::Tensor& x, int64_t bits, int64_t group, bool symmetric, bool widen,
                             double clip, bool half) {
    check_no_grad(x, "x");
    TORCH_CHECK(bits >= 2 && bits <= 8, "bits: got ", bits, ", expected 2 to 8");
    check_clip(clip);
    const Rows rows = rows_of(x, "x");
    const int64_t width = width_of_group(group, rows.n);
    at::Tensor y = at::empty(x.sizes(), x.options());
    const GridRule rule{static_cast<int>(bits), symmetric, widen, static_cast<float>(clip), half};
    fake_quantize({rows.data(), rows.stride, rows.count, rows.n, rows.dtype, rule, width, y.mutable_data_ptr()},
                  torch_parallel);
    return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(qexp, CPU, m) {
    m.impl("quantize_codes", quantize_codes_cpu);
    m.impl("dequantize_codes", dequantize_codes_cpu);
    m.impl("fake_quantize", fake_quantize_cpu);
}

}  // namespace qexp
