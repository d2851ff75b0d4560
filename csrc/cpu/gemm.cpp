// Cuts a product into tiles. Few rows read the nibbles directly, one pass over the weights; many rows unpack stretches
// of a panel of columns once and reuse them, with partial results of a chunk of rows kept in cache.
#include "gemm.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

#include "dispatch.h"
#include "float16.h"
#include "gemm_table.h"
#include "p16k8.h"

namespace qexp {
namespace {

constexpr int64_t kFewRows = 16;        // up to here weights are read directly
constexpr int64_t kChunkRows = 252;     // of a task: its results (32 KB) stay in the second-level cache
constexpr int64_t kStretch = 1024;      // k of a panel unpacked at once: 32 columns are 32 KB
constexpr int64_t kTaskBytes = 1 << 18; // of weights that are worth a task when there are few rows

template <class T>
class Buffer {  // cache-line aligned and not initialised
   public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(::operator new(static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T), kLine))) {}
    ~Buffer() { ::operator delete(data_, kLine); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get() const { return data_; }

   private:
    static constexpr std::align_val_t kLine{64};
    T* data_;
};

const GemmTable& table() {
#if defined(__x86_64__)
    switch (isa()) {
        case Isa::avx512vnni: return gemm_avx512vnni;
        case Isa::avx512bw: return gemm_avx512bw;
        case Isa::avxvnni: return gemm_avxvnni;
        case Isa::avx2: return gemm_avx2;
        case Isa::scalar: break;
    }
#endif
    return gemm_scalar;
}

// Rows cut into the fewest blocks of at most `most`, sizes as equal as they can be: a block of one costs most of one of
// seven.
struct RowBlocks {
    int64_t rows, count;

    RowBlocks(int64_t m, int64_t most) : rows(m), count((m + most - 1) / most) {}
    int64_t begin(int64_t i) const { return i * (rows / count) + std::min(i, rows % count); }
    int size(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
};

struct Shape {  // of the weight, in steps of 8 k
    int64_t steps, group, group_steps, groups, blocks;

    explicit Shape(const W4Weight& w)
        : steps(k_steps(w.k)), group(w.group ? w.group : w.k), group_steps(k_steps(group)),
          groups(steps / group_steps), blocks(column_blocks(w.n)) {}
};

// Activations of all rows, packed block by block: block i begins at byte begin(i) * steps * 8, sum begin(i) * groups.
struct Packed {
    Buffer<int8_t> a;
    Buffer<int32_t> sums;

    Packed(int64_t m, const Shape& s) : a(m * s.steps * 8), sums(m * s.groups) {}
};

void pack(const GemmTable& kernels, const W4A8Call& call, const Shape& s, const RowBlocks& rows, const Packed& packed,
          ParallelFor loop) {
    const int64_t grain = std::max<int64_t>(1, kTaskBytes / (s.steps * 8 * kMaxRows));
    split(loop, rows.count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t r = rows.begin(i);
            PackTask t;
            t.a = static_cast<const uint8_t*>(call.a) + r * call.row_bytes;
            t.nibbles = call.nibbles;
            t.row_bytes = call.row_bytes;
            t.rows = rows.size(i);
            t.k = call.weight.k;
            t.group = s.group;
            t.given = call.sums == nullptr ? nullptr : call.sums + r * s.groups;
            t.packed = packed.a.get() + r * s.steps * 8;
            t.sums = packed.sums.get() + r * s.groups;
            kernels.pack(t);
        }
    });
}

int64_t element_size(Float dtype) { return dtype == Float::fp32 ? 4 : 2; }

// Writes columns [block * 16, ...) of rows [first, first + count) from their totals.
void write_out(const GemmTable& kernels, const W4Output& out, const float* a_scale, const W4Weight& w, int64_t first,
               int64_t count, int64_t block, int64_t blocks, const float* total, int64_t leading) {
    const int64_t column = block * kBlockColumns;
    FinishTask t;
    t.total = total;
    t.leading = leading;
    t.rows = count;
    t.columns = std::min(blocks * kBlockColumns, w.n - column);
    t.a_scale = a_scale == nullptr ? nullptr : a_scale + first;
    t.bias = out.bias == nullptr ? nullptr : out.bias + column;
    t.out = static_cast<char*>(out.data) + (first * w.n + column) * element_size(out.dtype);
    t.out_stride = w.n;
    t.dtype = out.dtype;
    kernels.finish(t);
}

TileTask tile_task(const W4Weight& w, const Shape& s, int64_t block) {
    TileTask t{};
    t.w = w.blocks + block * s.steps * kBlockBytes;
    t.block_stride = s.steps * kBlockBytes;
    t.scale_stride = s.groups * kBlockColumns;
    t.scale = w.scale + block * t.scale_stride;
    t.shift = w.shift == nullptr ? nullptr : w.shift + block * t.scale_stride;
    t.steps = s.group_steps;
    t.groups = s.groups;
    t.first = t.last = true;
    return t;
}

// One product of integers, with what every part of it needs. out is nullptr when only the integers are wanted.
struct Job {
    const GemmTable& kernels;
    const W4A8Call& call;
    int32_t* integers;
    Shape shape;
    RowBlocks rows;
    const Packed& packed;

    void write(int64_t first, int64_t count, int64_t block, int64_t blocks, const float* total, const int32_t* carry,
               int64_t leading) const {
        if (integers == nullptr) {
            write_out(kernels, call.out, call.a_scale, call.weight, first, count, block, blocks, total, leading);
            return;
        }
        const int64_t column = block * kBlockColumns, n = call.weight.n;
        const int64_t columns = std::min(blocks * kBlockColumns, n - column);
        for (int64_t r = 0; r < count; ++r) {
            std::memcpy(integers + (first + r) * n + column, carry + r * leading, static_cast<size_t>(columns) * 4);
        }
    }
};

// ---- few rows ------------------------------------------------------------------------------------------------------

void direct_tile(const Job& job, int64_t block, int blocks) {
    alignas(64) float total[kMaxRows * kMaxBlocks * kBlockColumns];
    alignas(64) int32_t carry[kMaxRows * kMaxBlocks * kBlockColumns];
    for (int64_t i = 0; i < job.rows.count; ++i) {
        const int64_t first = job.rows.begin(i);
        const int count = job.rows.size(i);
        TileTask t = tile_task(job.call.weight, job.shape, block);
        t.a = job.packed.a.get() + first * job.shape.steps * 8;
        t.sums = job.packed.sums.get() + first * job.shape.groups;
        t.total = total;
        t.carry = carry;
        t.leading = blocks * kBlockColumns;
        t.last = job.integers == nullptr;
        std::memset(total, 0, static_cast<size_t>(count * t.leading) * sizeof(float));
        job.kernels.direct(t, count, blocks);
        job.write(first, count, block, blocks, total, carry, t.leading);
    }
}

void direct(const Job& job, ParallelFor loop) {
    const bool few = job.rows.size(0) <= 4;
    const int64_t wide = few ? job.kernels.direct_blocks_few : job.kernels.direct_blocks_many;
    const int64_t tiles = (job.shape.blocks + wide - 1) / wide;
    const int64_t grain = std::max<int64_t>(1, kTaskBytes / (wide * job.shape.steps * kBlockBytes));
    deal(loop, tiles, grain, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t block = tile * wide;
            if (job.shape.blocks - block >= wide) {
                direct_tile(job, block, static_cast<int>(wide));
            } else {
                for (int64_t b = block; b < job.shape.blocks; ++b) direct_tile(job, b, 1);
            }
        }
    });
}

// ---- many rows -----------------------------------------------------------------------------------------------------

// A stretch of K that is unpacked at once: whole groups, or a piece of one group that is longer.
struct Stretch {
    int64_t step, steps;    // first, and how many
    int64_t group, groups;  // of it
    bool first, last;
};

Stretch stretch_at(const Shape& s, int64_t step) {
    constexpr int64_t kMost = kStretch / kBlockSteps;
    if (s.group_steps <= kMost) {
        const int64_t group = step / s.group_steps, groups = std::min(kMost / s.group_steps, s.groups - group);
        return {step, groups * s.group_steps, group, groups, true, true};
    }
    const int64_t inside = step % s.group_steps, steps = std::min(kMost, s.group_steps - inside);
    return {step, steps, step / s.group_steps, 1, inside == 0, inside + steps == s.group_steps};
}

struct Workspace {  // of one task
    Buffer<uint8_t> panel{2 * kStretch * kMaxBlocks * kBlockColumns};
    Buffer<float> total{kChunkRows * kMaxBlocks * kBlockColumns};
    Buffer<int32_t> carry{kChunkRows * kMaxBlocks * kBlockColumns};
};

// All blocks of rows [first block, last block) against one unpacked stretch.
void multiply_stretch(const Job& job, const Stretch& k, int64_t block, int blocks, int64_t begin, int64_t end,
                      const Workspace& work) {
    const Shape& s = job.shape;
    const int64_t origin = job.rows.begin(begin), leading = blocks * kBlockColumns;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = job.rows.begin(i);
        const int count = job.rows.size(i);
        TileTask t = tile_task(job.call.weight, s, block);
        t.a = job.packed.a.get() + row * s.steps * 8 + k.step * count * 8;
        t.w = work.panel.get();
        t.scale += k.group * kBlockColumns;
        if (t.shift != nullptr) t.shift += k.group * kBlockColumns;
        t.sums = job.packed.sums.get() + row * s.groups + k.group * count;
        t.steps = k.steps / k.groups;
        t.groups = k.groups;
        t.first = k.first;
        t.last = k.last && job.integers == nullptr;
        t.total = work.total.get() + (row - origin) * leading;
        t.carry = work.carry.get() + (row - origin) * leading;
        t.leading = leading;
        job.kernels.panel(t, count, blocks);
    }
}

void panel_chunk(const Job& job, int64_t block, int blocks, int64_t begin, int64_t end, const Workspace& work) {
    const Shape& s = job.shape;
    const int64_t first = job.rows.begin(begin), count = job.rows.begin(end) - first, leading = blocks * kBlockColumns;
    std::memset(work.total.get(), 0, static_cast<size_t>(count * leading) * sizeof(float));
    for (int64_t step = 0; step < s.steps;) {
        const Stretch k = stretch_at(s, step);
        const uint8_t* w = job.call.weight.blocks + (block * s.steps + step) * kBlockBytes;
        job.kernels.unpack(w, s.steps * kBlockBytes, k.steps, blocks, work.panel.get());
        multiply_stretch(job, k, block, blocks, begin, end, work);
        step += k.steps;
    }
    job.write(first, count, block, blocks, work.total.get(), work.carry.get(), leading);
}

void panels(const Job& job, ParallelFor loop) {
    const int64_t wide = job.kernels.panel_blocks, columns = (job.shape.blocks + wide - 1) / wide;
    const int64_t in_chunk = kChunkRows / job.kernels.panel_rows, chunks = (job.rows.count + in_chunk - 1) / in_chunk;
    Queue queue(columns * chunks);
    split(loop, columns * chunks, 1, [&](int64_t, int64_t) {
        const Workspace work;
        for (int64_t task; queue.take(task);) {
            const int64_t row_block = task / columns * in_chunk, last = std::min(row_block + in_chunk, job.rows.count);
            const int64_t block = task % columns * wide, left = job.shape.blocks - block;
            for (int64_t b = 0; b < std::min(wide, left); b += left >= wide ? wide : 1) {
                panel_chunk(job, block + b, static_cast<int>(left >= wide ? wide : 1), row_block, last, work);
            }
        }
    });
}

void run(const W4A8Call& call, int32_t* integers, ParallelFor loop) {
    if (call.m == 0) return;
    const GemmTable& kernels = table();
    const Shape shape(call.weight);
    const bool few = call.m <= kFewRows;
    const RowBlocks rows(call.m, few ? kernels.direct_rows : kernels.panel_rows);
    const Packed packed(call.m, shape);
    pack(kernels, call, shape, rows, packed, loop);
    const Job job{kernels, call, integers, shape, rows, packed};
    few ? direct(job, loop) : panels(job, loop);
}

// ---- float activations ---------------------------------------------------------------------------------------------

float read_float(const void* x, Float dtype, int64_t i) {
    if (dtype == Float::fp32) return static_cast<const float*>(x)[i];
    const uint16_t half = static_cast<const uint16_t*>(x)[i];
    return dtype == Float::bf16 ? bf16_to_float(half) : fp16_to_float(half);
}

// One product of float activations. Packed rows take up to 4 bytes an element: fp32, or bf16 where the machine
// multiplies it (then 2).
struct FloatJob {
    const GemmTable& common;
    const FloatKernels& kernels;
    const W4A16Call& call;
    Shape shape;
    RowBlocks rows;
    bool pairs;  // x stays bf16
    Buffer<float> x, sums;

    FloatJob(const GemmTable& table, const FloatKernels& chosen, const W4A16Call& c, bool bf16)
        : common(table), kernels(chosen), call(c), shape(c.weight), rows(c.m, chosen.rows), pairs(bf16),
          x(c.m * shape.steps * (bf16 ? 4 : 8)), sums(c.m * shape.groups) {}

    void* packed(int64_t first) const { return x.get() + first * shape.steps * (pairs ? 4 : 8); }
};

// Row r of a block of `rows` as fp32.
void pack_float_row(const FloatJob& job, int64_t start, int64_t r, int64_t rows, float* packed) {
    const int64_t k = job.call.weight.k, padded = job.shape.steps * 8;
    for (int64_t i = 0; i < k; ++i) packed[i * rows + r] = read_float(job.call.x, job.call.dtype, start + i);
    for (int64_t i = k; i < padded; ++i) packed[i * rows + r] = 0.0f;
}

// The same as pairs of bf16, two elements to a word, a step of eight at a time.
void pack_pair_row(const FloatJob& job, const uint16_t* x, int64_t r, int64_t rows, uint32_t* packed) {
    const int64_t k = job.call.weight.k;
    for (int64_t step = 0; step < job.shape.steps; ++step) {
        uint16_t eight[8] = {};
        const int64_t left = k - step * 8;
        if (left >= 8) {
            std::memcpy(eight, x + step * 8, sizeof eight);
        } else {
            std::memcpy(eight, x + step * 8, static_cast<size_t>(left) * sizeof(uint16_t));
        }
        for (int pair = 0; pair < 4; ++pair) {
            const uint32_t high = eight[kPairs[pair][1]];
            packed[(step * 4 + pair) * rows + r] = eight[kPairs[pair][0]] | high << 16;
        }
    }
}

// In double: a zero point times the sum's rounding error would show.
void sum_float_row(const FloatJob& job, int64_t row, int64_t r, int64_t rows, float* sums) {
    const W4A16Call& call = job.call;
    for (int64_t g = 0; g < job.shape.groups; ++g) {
        const int64_t last = std::min((g + 1) * job.shape.group, call.weight.k);
        double sum = 0;
        for (int64_t k = g * job.shape.group; k < last; ++k) {
            sum += read_float(call.x, call.dtype, row * call.row_stride + k);
        }
        sums[g * rows + r] = static_cast<float>(sum);
    }
}

void pack_float_block(const FloatJob& job, int64_t block) {
    const W4A16Call& call = job.call;
    const int64_t first = job.rows.begin(block), rows = job.rows.size(block);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t start = (first + r) * call.row_stride;
        if (job.pairs) {
            const uint16_t* x = static_cast<const uint16_t*>(call.x) + start;
            pack_pair_row(job, x, r, rows, static_cast<uint32_t*>(job.packed(first)));
        } else {
            pack_float_row(job, start, r, rows, static_cast<float*>(job.packed(first)));
        }
        if (call.weight.shift != nullptr) {
            sum_float_row(job, first + r, r, rows, job.sums.get() + first * job.shape.groups);
        }
    }
}

void float_tile(const FloatJob& job, int64_t block, int blocks) {
    alignas(64) float total[kMaxRows * kMaxBlocks * kBlockColumns];
    const TileTask weight = tile_task(job.call.weight, job.shape, block);
    for (int64_t i = 0; i < job.rows.count; ++i) {
        const int64_t first = job.rows.begin(i), leading = blocks * kBlockColumns;
        const int count = job.rows.size(i);
        const FloatTileTask t = {job.packed(first), weight.w,     weight.block_stride,
                                 weight.scale,      weight.shift, weight.scale_stride,
                                 job.sums.get() + first * job.shape.groups,
                                 weight.steps,      weight.groups, total, leading};
        std::memset(total, 0, static_cast<size_t>(count * leading) * sizeof(float));
        job.kernels.direct(t, count, blocks);
        write_out(job.common, job.call.out, nullptr, job.call.weight, first, count, block, blocks, total, leading);
    }
}

bool bf16_kernels(const W4A16Call& call) { return call.dtype == Float::bf16 && use_avx512bf16(); }

const FloatKernels& float_kernels(const GemmTable& kernels, bool pairs) {
#if defined(__x86_64__)
    if (pairs) return gemm_avx512bf16;
#else
    (void)pairs;
#endif
    return kernels.fp32;
}

}  // namespace

void w4a8(const W4A8Call& call, ParallelFor loop) { run(call, nullptr, loop); }

void w4a8_i32(const int8_t* a, int64_t row_bytes, int64_t m, const W4Weight& weight, int32_t* out, ParallelFor loop) {
    W4A8Call call{};
    call.a = a;
    call.row_bytes = row_bytes;
    call.m = m;
    call.weight = weight;
    call.weight.group = 0;  // integers of all k
    run(call, out, loop);
}

void w4a16(const W4A16Call& call, ParallelFor loop) {
    if (call.m == 0) return;
    const GemmTable& kernels = table();
    const bool pairs = bf16_kernels(call);
    const FloatJob job(kernels, float_kernels(kernels, pairs), call, pairs);
    const int64_t row_bytes = job.shape.steps * 32 * kMaxRows;
    split(loop, job.rows.count, std::max<int64_t>(1, kTaskBytes / row_bytes), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) pack_float_block(job, i);
    });
    const int64_t wide = job.rows.size(0) <= 4 ? job.kernels.blocks_few : job.kernels.blocks_many;
    const int64_t tiles = (job.shape.blocks + wide - 1) / wide, tile_bytes = wide * job.shape.steps * kBlockBytes;
    const int64_t grain = std::max<int64_t>(1, kTaskBytes / (tile_bytes * job.rows.count));
    deal(loop, tiles, grain, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t block = tile * wide, left = std::min(wide, job.shape.blocks - block);
            const int64_t step = left == wide ? wide : 1;
            for (int64_t b = 0; b < left; b += step) float_tile(job, block + b, static_cast<int>(step));
        }
    });
}

}  // namespace qexp
