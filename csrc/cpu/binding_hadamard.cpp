// torch.ops.qexp.hadamard and had_quant for CPU tensors: checks, shapes, and rows of any outer stride as they lie.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "binding.h"
#include "binding_rows.h"
#include "hadamard.h"

namespace qexp {
namespace {

// Keeps the picks of H_K' alive beside the rotation that points to them.
struct Map {
    Rotation rotation;
    Picks picks;
};

void check_had_k(const at::Tensor& had_k) {
    check_cpu(had_k, "had_k");
    check_dtype(had_k, "had_k", at::kChar);
    const bool square = had_k.dim() == 2 && had_k.size(0) == had_k.size(1) && had_k.size(0) > 1;
    TORCH_CHECK(square, "had_k: got shape ", had_k.sizes(), ", expected [K', K'], K' > 1");
}

Map rotation_of(int64_t n, int64_t block, const std::optional<at::Tensor>& had_k) {
    TORCH_CHECK(block >= 0 && n % (block ? block : n) == 0, "block: got ", block,
                      ", expected 0 or a divisor of n=", n);
    if (had_k) check_had_k(*had_k);
    Map map;
    const int64_t width = block ? block : n;
    map.rotation.order = had_k ? had_k->size(0) : 1;
    while (map.rotation.width() > 0 && map.rotation.width() < width) ++map.rotation.power;
    const int64_t odd = width / (width & -width);
    TORCH_CHECK(map.rotation.width() == width, "had_k: got order ", map.rotation.order, " for width ", width,
                      ", expected ", width, " = K' 2^p",
                      odd > 1 ? " with K' a multiple of " + std::to_string(odd) : std::string());
    if (had_k) {
        const at::Tensor dense = had_k->contiguous();
        map.picks = picks_of(dense.const_data_ptr<int8_t>(), map.rotation.order);
        TORCH_CHECK(!map.picks.picks.empty(), "had_k: got other entries, expected +1 and -1");
        map.rotation.picks = map.picks.picks.data();
        map.rotation.positives = map.picks.positives.data();
    }
    return map;
}

at::Tensor hadamard_cpu(const at::Tensor& x, int64_t block, double scale, const std::optional<at::Tensor>& had_k) {
    const Rows rows = rows_of(x, "x");
    const Map map = rotation_of(rows.n, block, had_k);
    at::Tensor y = at::empty(x.sizes(), x.options());
    hadamard({rows.data(), y.mutable_data_ptr(), rows.stride, rows.count, rows.n, rows.dtype, map.rotation,
              static_cast<float>(scale)},
             torch_parallel);
    return y;
}

void check_quantizer(int64_t n, int64_t bits, double clip, int64_t group, int64_t sum_group) {
    TORCH_CHECK(bits == 4 || bits == 8, "bits: got ", bits, ", expected 4 or 8");
    TORCH_CHECK(clip > 0 && clip <= 1, "clip: got ", clip, ", expected a number in (0, 1]");
    TORCH_CHECK(group >= 0 && n % (group ? group : n) == 0, "group: got ", group,
                      ", expected 0 or a divisor of n=", n);
    TORCH_CHECK(sum_group >= 0 && n % (sum_group ? sum_group : n) == 0, "sum_group: got ", sum_group,
                      ", expected 0 or a divisor of n=", n);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> had_quant_cpu(const at::Tensor& x, int64_t bits, int64_t block,
                                                             bool rotate, double clip, int64_t group,
                                                             const std::optional<at::Tensor>& had_k, bool container8,
                                                             int64_t sum_group) {
    check_no_grad(x, "x");
    const Rows rows = rows_of(x, "x");
    const int64_t n = rows.n, m = rows.count, sums_of = sum_group ? sum_group : n;
    check_quantizer(n, bits, clip, group, sum_group);
    const Map map = rotate ? rotation_of(n, block, had_k) : Map{};
    const bool packed = bits == 4 && !container8;
    TORCH_CHECK(!packed || n % 2 == 0, "x: got n=", n, ", expected an even n to pack nibbles");
    const auto like = x.options();
    at::Tensor q = at::empty({m, packed ? n / 2 : n}, like.dtype(packed ? at::kByte : at::kChar));
    const std::vector<int64_t> scales = group ? std::vector<int64_t>{m, n / group} : std::vector<int64_t>{m};
    at::Tensor scale = at::empty(scales, like.dtype(at::kFloat));
    at::Tensor sums = at::empty({m, n / sums_of}, like.dtype(at::kInt));
    const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(map.rotation.width())));
    had_quant({rows.data(), rows.stride, m, n, rows.dtype, map.rotation, norm, static_cast<float>(clip),
               static_cast<int>(bits), packed, group ? group : n, sums_of,
               static_cast<uint8_t*>(q.mutable_data_ptr()), scale.mutable_data_ptr<float>(),
               sums.mutable_data_ptr<int32_t>()},
              torch_parallel);
    return {q, scale, sums};
}

}  // namespace

TORCH_LIBRARY_IMPL(qexp, CPU, m) {
    m.impl("hadamard", hadamard_cpu);
    m.impl("had_quant", had_quant_cpu);
}

}  // namespace qexp
