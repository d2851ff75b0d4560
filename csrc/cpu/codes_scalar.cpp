// The plain tier of codes.h: any shape, one value at a time.
#include "codes.h"
#include "codes_grid.h"
#include "float16.h"

namespace qexp {
namespace {

float load(const void* x, Dtype dtype, int64_t i) {
    if (dtype == Dtype::fp32) return static_cast<const float*>(x)[i];
    const uint16_t half = static_cast<const uint16_t*>(x)[i];
    return dtype == Dtype::bf16 ? bf16_to_float(half) : fp16_to_float(half);
}

void store(void* y, Dtype dtype, int64_t i, float value) {
    if (dtype == Dtype::fp32) {
        static_cast<float*>(y)[i] = value;
    } else {
        static_cast<uint16_t*>(y)[i] = dtype == Dtype::bf16 ? float_to_bf16(value) : float_to_fp16(value);
    }
}

Range range_of(const void* x, Dtype dtype, int64_t begin, int64_t count) {
    Range range{from_bits(kInfBits), -from_bits(kInfBits)};
    for (int64_t i = begin; i < begin + count; ++i) {
        const float v = load(x, dtype, i);
        if (v != v) return {v, v};
        range.low = v < range.low ? v : range.low;
        range.high = v > range.high ? v : range.high;
    }
    return range;
}

float clamp(float v, float low, float high) { return v < low ? low : (v > high ? high : v); }  // NaN stays

void quantize_rows(const QuantizeTask& task, int64_t begin, int64_t end) {
    const int64_t scales = task.n / task.group, bytes = task.n * task.rule.bits / 8;
    const float top = static_cast<float>((1 << task.rule.bits) - 1);
    for (int64_t r = begin; r < end; ++r) {
        uint8_t* packed = task.packed + r * bytes;
        for (int64_t i = 0; i < bytes; ++i) packed[i] = 0;
        for (int64_t s = 0; s < scales; ++s) {
            const int64_t start = r * task.row_stride + s * task.group;
            const Grid grid = grid_of(range_of(task.x, task.dtype, start, task.group), task.rule);
            const bool good = storable(grid);
            task.scale[r * scales + s] = good ? grid.scale : from_bits(kNanBits);
            task.zero[r * scales + s] = good ? grid.zero : 0.0f;
            for (int64_t i = 0; good && i < task.group; ++i) {
                const float value = load(task.x, task.dtype, start + i);
                const float level = __builtin_nearbyintf(value * grid.inverse) + grid.zero;
                const auto code = static_cast<unsigned>(clamp(level, 0.0f, top));
                const int64_t bit = (s * task.group + i) * task.rule.bits;
                packed[bit / 8] = static_cast<uint8_t>(packed[bit / 8] | (code << (bit % 8)));
            }
        }
    }
}

void dequantize_rows(const DequantizeTask& task, int64_t begin, int64_t end) {
    const int64_t scales = task.n / task.group, bytes = task.n * task.bits / 8;
    const unsigned mask = (1u << task.bits) - 1u;
    for (int64_t r = begin; r < end; ++r) {
        for (int64_t i = 0; i < task.n; ++i) {
            const int64_t bit = i * task.bits, s = r * scales + i / task.group;
            const unsigned code = (task.packed[r * bytes + bit / 8] >> (bit % 8)) & mask;
            store(task.y, task.dtype, r * task.n + i, (static_cast<float>(code) - task.zero[s]) * task.scale[s]);
        }
    }
}

// x^ of one value; a symmetric grid is centred, so its zero point never enters and -0 stays -0.
float fake(float v, const Grid& grid, const GridRule& rule) {
    const float level = __builtin_nearbyintf(v * grid.inverse);
    if (rule.symmetric) return clamp(level, -grid.zero, grid.zero - 1.0f) * grid.scale;
    const float top = static_cast<float>((1 << rule.bits) - 1);
    return (clamp(level + grid.zero, 0.0f, top) - grid.zero) * grid.scale;
}

void fake_quantize_rows(const FakeQuantizeTask& task, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        for (int64_t g = 0; g < task.n; g += task.group) {
            const int64_t start = r * task.row_stride + g;
            const Grid grid = grid_of(range_of(task.x, task.dtype, start, task.group), task.rule);
            for (int64_t i = 0; i < task.group; ++i) {
                const float v = load(task.x, task.dtype, start + i);
                store(task.y, task.dtype, r * task.n + g + i, fake(v, grid, task.rule));
            }
        }
    }
}

}  // namespace

const CodesKernels codes_scalar = {quantize_rows, dequantize_rows, fake_quantize_rows};

}  // namespace qexp
