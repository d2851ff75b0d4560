// The plain tier: any shape, one value at a time; what the vector tiers must equal bit for bit.
#include "float16.h"
#include "hadamard.h"
#include "hadamard_scale.h"

namespace qexp {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds |v| < 2^22 half to even

void load_row(const void* x, Dtype dtype, int64_t offset, int64_t n, float* to) {
    const auto* half = static_cast<const uint16_t*>(x) + offset;
    if (dtype == Dtype::fp32) {
        std::memcpy(to, static_cast<const float*>(x) + offset, static_cast<size_t>(n) * sizeof(float));
    } else if (dtype == Dtype::bf16) {
        for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(half[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = fp16_to_float(half[i]);
    }
}

void store_row(const float* from, float scale, Dtype dtype, int64_t offset, int64_t n, void* y) {
    auto* half = static_cast<uint16_t*>(y) + offset;
    if (dtype == Dtype::fp32) {
        auto* out = static_cast<float*>(y) + offset;
        for (int64_t i = 0; i < n; ++i) out[i] = from[i] * scale;
    } else if (dtype == Dtype::bf16) {
        for (int64_t i = 0; i < n; ++i) half[i] = float_to_bf16(from[i] * scale);
    } else {
        for (int64_t i = 0; i < n; ++i) half[i] = float_to_fp16(from[i] * scale);
    }
}

void butterflies(float* block, int64_t size) {
    for (int64_t stride = 1; stride < size; stride *= 2) {
        for (int64_t base = 0; base < size; base += 2 * stride) {
            for (int64_t j = base; j < base + stride; ++j) {
                const float a = block[j], b = block[j + stride];
                block[j] = a + b;
                block[j + stride] = a - b;
            }
        }
    }
}

// The eight sums of inputs 4 g .. 4 g + 3 in one column that begin with +; inputs past the last count as 0.
void signed_sums(const float* column, int64_t columns, int64_t count, float* sums) {
    float v[4];
    for (int t = 0; t < 4; ++t) v[t] = t < count ? column[t * columns] : 0.0f;
    const float ab[2] = {v[0] + v[1], v[0] - v[1]}, cd[2] = {v[2] + v[3], v[2] - v[3]};
    for (int k = 0; k < 8; ++k) sums[k] = k & 4 ? ab[k & 1] - cd[(k >> 1) & 1] : ab[k & 1] + cd[(k >> 1) & 1];
}

// Row i of H_K' times one column, from the sums of all groups.
float output(const Rotation& r, int64_t i, const float* sums) {
    float total = 0.0f;
    for (int64_t c = 0; c < r.chunks(); ++c, sums += 8 * Rotation::kChunk) {
        const int64_t begin = c * Rotation::kChunk, left = r.groups() - begin;
        const uint8_t* picks = r.picks + i * r.groups() + begin;
        const int64_t count = left < Rotation::kChunk ? left : Rotation::kChunk;
        const int64_t positive = r.positives[i * r.chunks() + c];
        for (int64_t g = 0; g < positive; ++g) total += sums[picks[g]];
        for (int64_t g = positive; g < count; ++g) total -= sums[picks[g]];
    }
    return total;
}

// block [order][columns] <- H_K' block. scratch holds 8 sums for every four rows, then order totals.
void mix(float* block, const Rotation& r, float* scratch) {
    const int64_t columns = int64_t{1} << r.power;
    float* total = scratch + 8 * r.groups();
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t g = 0; g < r.groups(); ++g) {
            signed_sums(block + 4 * g * columns + c, columns, r.order - 4 * g, scratch + 8 * g);
        }
        for (int64_t i = 0; i < r.order; ++i) total[i] = output(r, i, scratch);
        for (int64_t i = 0; i < r.order; ++i) block[i * columns + c] = total[i];
    }
}

void rotate(float* row, int64_t n, const Rotation& rotation, float* scratch) {
    const int64_t columns = int64_t{1} << rotation.power;
    for (int64_t base = 0; base < n; base += columns) butterflies(row + base, columns);
    if (rotation.order == 1) return;
    for (int64_t base = 0; base < n; base += rotation.width()) mix(row + base, rotation, scratch);
}

uint32_t largest(const float* values, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t magnitude = to_bits(values[i]) & 0x7FFFFFFFu;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

// Codes as floats, in place: the same buffer then feeds packing and sums.
void encode(float* values, int64_t count, const Scale& scale, int bits) {
    const float top = static_cast<float>((1 << (bits - 1)) - 1), low = -top - 1.0f;
    for (int64_t i = 0; i < count; ++i) {
        const float v = scale.good ? values[i] * scale.step : 0.0f;
        const float clamped = v > top ? top : (v < low ? low : v);
        values[i] = clamped + kRound - kRound;
    }
}

void write_codes(const float* codes, int64_t n, bool packed, uint8_t* q) {
    const auto code = [codes](int64_t i) { return static_cast<int>(codes[i]); };
    if (packed) {
        for (int64_t i = 0; i < n; i += 2) {
            q[i / 2] = static_cast<uint8_t>((code(i) & 15) | ((code(i + 1) & 15) << 4));
        }
    } else {
        for (int64_t i = 0; i < n; ++i) q[i] = static_cast<uint8_t>(code(i));
    }
}

void write_sums(const float* codes, int64_t n, int64_t group, int32_t* sums) {
    for (int64_t i = 0; i < n; i += group) {
        int32_t sum = 0;
        for (int64_t j = i; j < i + group; ++j) sum += static_cast<int32_t>(codes[j]);
        sums[i / group] = sum;
    }
}

void hadamard_rows(const HadamardTask& task, int64_t begin, int64_t end, float* work) {
    for (int64_t r = begin; r < end; ++r) {
        load_row(task.x, task.dtype, r * task.row_stride, task.n, work);
        rotate(work, task.n, task.rotation, work + task.n);
        store_row(work, task.scale, task.dtype, r * task.n, task.n, task.y);
    }
}

void had_quant_rows(const HadQuantTask& task, int64_t begin, int64_t end, float* work) {
    const int64_t n = task.n, scales = n / task.group;
    for (int64_t r = begin; r < end; ++r) {
        load_row(task.x, task.dtype, r * task.row_stride, n, work);
        rotate(work, n, task.rotation, work + n);
        for (int64_t s = 0; s < scales; ++s) {
            float* part = work + s * task.group;
            const Scale scale = scale_of(largest(part, task.group), task.norm, task.clip, task.bits);
            task.scale[r * scales + s] = scale.scale;
            encode(part, task.group, scale, task.bits);
        }
        write_codes(work, n, task.packed, task.q + r * (task.packed ? n / 2 : n));
        write_sums(work, n, task.sum_group, task.sums + r * (n / task.sum_group));
    }
}

}  // namespace

const HadamardKernels hadamard_scalar = {hadamard_rows, had_quant_rows};

}  // namespace qexp
