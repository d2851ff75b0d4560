#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <optional>

#include "binding.h"
#include "floors.h"
#include "gemm.h"
#include "p16k8.h"

namespace qexp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Float float_of(at::ScalarType dtype, const char* name) {
    if (dtype == at::kFloat) return Float::fp32;
    if (dtype == at::kBFloat16) return Float::bf16;
    TORCH_CHECK(dtype == at::kHalf, name, ": got ", dtype, ", expected Float, BFloat16 or Half");
    return Float::fp16;
}

W4Header read_header(const Tensor& w_p) {
    check_cpu(w_p, "w_p");
    check_dtype(w_p, "w_p", at::kByte);
    TORCH_CHECK(w_p.dim() == 1 && w_p.numel() >= kHeaderBytes && w_p.is_contiguous(), "w_p: got shape ", w_p.sizes(),
                ", expected the vector that prepack_w4 returns");
    W4Header header;
    std::memcpy(&header, w_p.const_data_ptr<uint8_t>(), sizeof header);
    TORCH_CHECK(std::memcmp(header.magic, "QXW4", 4) == 0 && header.version == 1,
                "w_p: got no packed weight of version 1, expected what prepack_w4 returns");
    TORCH_CHECK(header.layout == kLayoutCpu, "w_p: got layout ", static_cast<int>(header.layout), ", expected ",
                static_cast<int>(kLayoutCpu), " (p16k8); call prepack_w4 with target=\"cpu\" or \"auto\"");
    const bool sane = header.n > 0 && header.k > 0 && header.k <= kLargestK && header.n <= (int64_t{1} << 40);
    TORCH_CHECK(sane && w_p.numel() == p16k8_bytes(header.n, header.k), "w_p: got ", w_p.numel(),
                " bytes for n=", header.n, ", K=", header.k, ", expected a whole packed weight with K <= ", kLargestK);
    return header;
}

W4Weight weight_of(const Tensor& w_p, int64_t n, int64_t k) {
    const W4Header header = read_header(w_p);
    TORCH_CHECK(n == header.n, "n: got ", n, ", expected ", header.n, ", with which w_p was packed");
    TORCH_CHECK(k == header.k, "K: got ", k, ", expected ", header.k, ", with which w_p was packed");
    W4Weight weight{};
    weight.blocks = w_p.const_data_ptr<uint8_t>() + kHeaderBytes;
    weight.n = header.n;
    weight.k = header.k;
    weight.group = header.group;
    return weight;
}

const float* scales_of(const Tensor& scales, const char* name, const W4Weight& w) {
    const int64_t groups = w.group == 0 ? 1 : w.k / w.group;
    check_cpu(scales, name);
    check_dtype(scales, name, at::kFloat);
    const bool fits = scales.dim() == 3 && scales.size(0) == column_blocks(w.n) && scales.size(1) == groups &&
                      scales.size(2) == kBlockColumns && scales.is_contiguous();
    TORCH_CHECK(fits, name, ": got shape ", scales.sizes(), ", expected contiguous [", column_blocks(w.n), ", ", groups,
                ", ", kBlockColumns, "] as prepack_w4 returns it");
    return scales.const_data_ptr<float>();
}

W4Weight whole_weight(const Tensor& w_p, const Tensor& w_s, const OptionalTensor& w_z, int64_t n, int64_t k,
                      int64_t group) {
    W4Weight weight = weight_of(w_p, n, k);
    TORCH_CHECK(group == weight.group, "group: got ", group, ", expected ", weight.group, ", with which w_p was packed");
    TORCH_CHECK(group == 0 || (group > 0 && group % 8 == 0 && k % group == 0), "w_p: got group ", group,
                " in its header, expected 0 or a multiple of 8 that divides K=", k);
    weight.scale = scales_of(w_s, "w_s", weight);
    const bool shifted = w_z.has_value() && w_z->numel() > 0;
    weight.shift = shifted ? scales_of(*w_z, "w_z", weight) : nullptr;
    return weight;
}

// The bias as contiguous fp32; the tensor owns what the pointer reads.
Tensor float_bias(const OptionalTensor& bias, int64_t n) {
    if (!bias.has_value()) return {};
    check_cpu(*bias, "bias");
    check_no_grad(*bias, "bias");
    float_of(bias->scalar_type(), "bias");
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias: got shape ", bias->sizes(), ", expected [", n, "]");
    return bias->to(at::kFloat).contiguous();
}

const float* pointer(const Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

// Rows whose elements are adjacent; any distance between rows is taken as it is.
Tensor dense_rows(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous(); }

void check_matrix(const Tensor& x, const char* name) {
    check_cpu(x, name);
    check_no_grad(x, name);
    TORCH_CHECK(x.dim() == 2, name, ": got shape ", x.sizes(), ", expected [M, K]");
}

Tensor check_sums(const OptionalTensor& sums, int64_t m, const W4Weight& w) {
    if (!sums.has_value()) return {};
    const int64_t groups = w.group == 0 ? 1 : w.k / w.group;
    check_cpu(*sums, "a_sums");
    check_dtype(*sums, "a_sums", at::kInt);
    TORCH_CHECK(sums->dim() == 2 && sums->size(0) == m && sums->size(1) == groups, "a_sums: got shape ", sums->sizes(),
                ", expected [", m, ", ", groups, "]");
    return sums->contiguous();
}

Tensor integer_product(const Tensor& a_q, bool nibbles, const Tensor& a_scale, const OptionalTensor& a_sums,
                       const W4Weight& weight, const OptionalTensor& bias, at::ScalarType out_dtype) {
    const int64_t m = a_q.size(0);
    check_cpu(a_scale, "a_scale");
    check_no_grad(a_scale, "a_scale");
    check_dtype(a_scale, "a_scale", at::kFloat);
    TORCH_CHECK(a_scale.dim() == 1 && a_scale.size(0) == m, "a_scale: got shape ", a_scale.sizes(), ", expected [", m,
                "]");
    const Float out_type = float_of(out_dtype, "out_dtype");
    const Tensor rows = dense_rows(a_q), scale = a_scale.contiguous(), sums = check_sums(a_sums, m, weight);
    const Tensor bias32 = float_bias(bias, weight.n);
    Tensor out = at::empty({m, weight.n}, a_q.options().dtype(out_dtype));
    W4A8Call call{};
    call.a = rows.const_data_ptr();
    call.nibbles = nibbles;
    call.row_bytes = rows.stride(0);
    call.m = m;
    call.a_scale = pointer(scale);
    call.sums = sums.defined() ? sums.const_data_ptr<int32_t>() : nullptr;
    call.weight = weight;
    call.out = {pointer(bias32), out.mutable_data_ptr(), out_type};
    w4a8(call, torch_parallel);
    return out;
}

Tensor w4a8_cpu(const Tensor& a_q, const Tensor& a_scale, const OptionalTensor& a_sums, const Tensor& w_p,
                const Tensor& w_s, const OptionalTensor& w_z, int64_t n, int64_t group, const OptionalTensor& bias,
                at::ScalarType out_dtype) {
    check_matrix(a_q, "a_q");
    check_dtype(a_q, "a_q", at::kChar);
    const W4Weight weight = whole_weight(w_p, w_s, w_z, n, a_q.size(1), group);
    return integer_product(a_q, false, a_scale, a_sums, weight, bias, out_dtype);
}

Tensor w4a4_cpu(const Tensor& a_q, const Tensor& a_scale, const OptionalTensor& a_sums, const Tensor& w_p,
                const Tensor& w_s, const OptionalTensor& w_z, int64_t n, int64_t group, const OptionalTensor& bias,
                at::ScalarType out_dtype) {
    check_matrix(a_q, "a_q");
    const bool nibbles = a_q.scalar_type() == at::kByte;
    TORCH_CHECK(nibbles || a_q.scalar_type() == at::kChar, "a_q: got ", a_q.scalar_type(),
                ", expected Byte [M, K / 2] or Char [M, K]");
    const W4Weight weight = whole_weight(w_p, w_s, w_z, n, a_q.size(1) * (nibbles ? 2 : 1), group);
    return integer_product(a_q, nibbles, a_scale, a_sums, weight, bias, out_dtype);
}

Tensor w4a16_cpu(const Tensor& x, const Tensor& w_p, const Tensor& w_s, const OptionalTensor& w_z, int64_t n,
                 int64_t group, const OptionalTensor& bias) {
    check_matrix(x, "x");
    const Float dtype = float_of(x.scalar_type(), "x");
    const W4Weight weight = whole_weight(w_p, w_s, w_z, n, x.size(1), group);
    const Tensor rows = dense_rows(x), bias32 = float_bias(bias, weight.n);
    Tensor out = at::empty({x.size(0), weight.n}, x.options());
    W4A16Call call{};
    call.x = rows.const_data_ptr();
    call.dtype = dtype;
    call.row_stride = rows.stride(0);
    call.m = x.size(0);
    call.weight = weight;
    call.out = {pointer(bias32), out.mutable_data_ptr(), dtype};
    w4a16(call, torch_parallel);
    return out;
}

Tensor w4a8_i32_cpu(const Tensor& a_q, const Tensor& w_p, int64_t n) {
    check_matrix(a_q, "a_q");
    check_dtype(a_q, "a_q", at::kChar);
    const W4Weight weight = weight_of(w_p, n, a_q.size(1));
    const Tensor rows = dense_rows(a_q);
    Tensor out = at::empty({a_q.size(0), n}, a_q.options().dtype(at::kInt));
    w4a8_i32(rows.const_data_ptr<int8_t>(), rows.stride(0), rows.size(0), weight, out.mutable_data_ptr<int32_t>(),
             torch_parallel);
    return out;
}

Tensor p16k8_cpu(const Tensor& w_q, int64_t group) {
    check_dtype(w_q, "w_q", at::kByte);
    TORCH_CHECK(w_q.dim() == 2 && w_q.numel() > 0, "w_q: got shape ", w_q.sizes(), ", expected [N, K / 2], not empty");
    TORCH_CHECK(group >= 0, "group: got ", group, ", expected 0 or more");
    const int64_t n = w_q.size(0), k = 2 * w_q.size(1);
    TORCH_CHECK(k <= kLargestK, "w_q: got K=", k, ", expected at most ", kLargestK, ": sums are 32-bit");
    const Tensor dense = w_q.contiguous();
    Tensor packed = at::empty({p16k8_bytes(n, k)}, w_q.options());
    advise_huge_pages(packed.mutable_data_ptr(), packed.numel());
    prepack_p16k8(dense.const_data_ptr<uint8_t>(), n, k, group, packed.mutable_data_ptr<uint8_t>(), torch_parallel);
    return packed;
}

// The floors as ops, so that they run on the threads the kernels run on: int64 results.
Tensor floor_read_cpu(const Tensor& x) {
    TORCH_CHECK(x.is_contiguous(), "x: got a strided tensor, expected a contiguous one");
    Tensor out = at::empty({}, x.options().dtype(at::kLong));
    const uint64_t seen = floor_read(x.const_data_ptr(), x.numel() * x.element_size(), torch_parallel);
    *out.mutable_data_ptr<int64_t>() = static_cast<int64_t>(seen);
    return out;
}

Tensor floor_dot_cpu(const Tensor& x, int64_t steps) {
    TORCH_CHECK(steps >= 0, "steps: got ", steps, ", expected 0 or more");
    int32_t sink = 0;
    Tensor out = at::empty({2}, x.options().dtype(at::kLong));
    out.mutable_data_ptr<int64_t>()[0] = floor_dot(steps, at::get_num_threads(), &sink, torch_parallel);
    out.mutable_data_ptr<int64_t>()[1] = sink;
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(qexp, CPU, m) {
    m.impl("w4a8", w4a8_cpu);
    m.impl("w4a4", w4a4_cpu);
    m.impl("w4a16", w4a16_cpu);
    m.impl("w4a8_i32", w4a8_i32_cpu);
    m.impl("p16k8", p16k8_cpu);
    m.impl("floor_read", floor_read_cpu);
    m.impl("floor_dot", floor_dot_cpu);
}

}  // namespace qexp
