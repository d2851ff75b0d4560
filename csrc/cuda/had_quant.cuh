// Hadamard rotation of rows, alone or fused with quantization: one read of x, one write of codes.
//
// A thread owns 32 elements at a time and makes up to five butterfly stages in registers; between stages a row waits in
// shared memory as floats. Stages commute, so the first ones run over the high bits of the index, where a warp reads
// consecutive pairs of columns, and the last five over 32 neighbours, which are then quantized and packed in place:
//   n <= 32 no exchange, <= 512 one, <= 8192 two.
// The factor of order K' (n = K' 2^power) comes first, on the tensor cores: its entries are +-1 and x has 16 bits, so
// the products are exact and the sums are fp32. Its signs are one bit each in shared memory.
#pragma once

#include "numbers.cuh"

namespace qexp::cuda {

struct RotationArgs {
    QexpRotation r;
    int rows_per_block, power;
};

// Where the parts of a block's shared memory start, in bytes; every part starts at a multiple of 16. Functions of the
// parameters, not stored: the kernel has no register to keep an offset in.
struct RotationPlan {
    int elements, slots, sum_slots, sign_words;  // slots: groups of the block's rows
    bool exchange, dense;

    QEXP_BOTH explicit RotationPlan(const RotationArgs& p)
        : elements(p.rows_per_block * p.r.n),
          slots(elements / p.r.group),
          sum_slots(elements / p.r.sum_group),
          sign_words((p.r.order + 31) / 32),
          exchange(p.power > 5 || p.r.order > 1),
          dense(p.r.order > 1) {}
    QEXP_BOTH static int rounded(int bytes) { return (bytes + 15) / 16 * 16; }
    QEXP_BOTH int maxima() const { return exchange ? elements * 4 : 0; }  // behind the values
    QEXP_BOTH int sums() const { return maxima() + rounded(slots * 4); }
    QEXP_BOTH int zeros() const { return sums() + rounded(sum_slots * 4); }
    QEXP_BOTH int signs() const { return zeros() + (dense ? 16 : 0); }
    QEXP_BOTH int raw(const RotationArgs& p) const {
        return signs() + (dense ? rounded(p.r.order * sign_words * 4) : 0);
    }
    QEXP_BOTH int total(const RotationArgs& p) const { return raw(p) + (dense ? elements * 2 : 0); }
};

template <int x_type, bool quantize>
struct RotationKernel {
    using Args = RotationArgs;
    static constexpr int threads = 1024, blocks_per_sm = 1, kUnit = 32;
    static constexpr bool k16 = x_type != QEXP_F32;

    struct Block {
        char* shared;
        RotationPlan plan;
        int64_t row0;
        int valid;  // elements of real rows
        QEXP_DEVICE Block(const Args& p, void* memory) : shared(static_cast<char*>(memory)), plan(p) {
            row0 = static_cast<int64_t>(simt::block_x()) * p.rows_per_block;
            const int64_t left = p.r.rows - row0;
            valid = static_cast<int>(left < p.rows_per_block ? left : p.rows_per_block) * p.r.n;
        }
        QEXP_DEVICE float* values() const { return reinterpret_cast<float*>(shared); }
        QEXP_DEVICE uint32_t* maxima() const { return reinterpret_cast<uint32_t*>(shared + plan.maxima()); }
        QEXP_DEVICE int* sums() const { return reinterpret_cast<int*>(shared + plan.sums()); }
    };

    static QEXP_DEVICE float widen(uint32_t bits) {
        return x_type == QEXP_BF16 ? simt::from_bf16(bits) : simt::from_half(bits);
    }
    static QEXP_DEVICE uint32_t narrow(float value) { return encode(value, x_type); }

    // ---- the factor of order K' ---------------------------------------------------------------------------------

    // The raw rows are read as 8 x 8 matrices down their columns: chunks of 8 are permuted by the row of H they meet.
    static QEXP_DEVICE int raw_chunk(const Args& p, int chunk) {
        return p.power >= 6 ? chunk ^ (chunk >> (p.power - 3) & 7) : chunk;
    }

    static QEXP_DEVICE void load_raw(const Args& p, const Block& block, char* raw, uint32_t* signs, int thread_count) {
        const char* x = static_cast<const char*>(p.r.x) + block.row0 * p.r.n * 2;
        for (int chunk = simt::thread(); chunk < block.plan.elements / 8; chunk += thread_count) {
            const bool valid = chunk * 8 < block.valid;
            simt::copy_async(raw + raw_chunk(p, chunk) * 16, x + (valid ? chunk * 16 : 0), valid);
        }
        simt::copy_commit();
        const int order = p.r.order, words = block.plan.sign_words;
        for (int i = simt::thread(); i < order * words; i += thread_count) {
            const int row = i / words, first = i % words * 32;
            uint32_t bits = 0;
            for (int k = first; k < order && k < first + 32; ++k)
                bits |= static_cast<uint32_t>(p.r.had_k[row * order + k] < 0) << (k - first);
            signs[i] = bits;
        }
        if (simt::thread() < 4) reinterpret_cast<uint32_t*>(block.shared + block.plan.zeros())[simt::thread()] = 0;
        simt::copy_wait<0>();
        simt::sync();
    }

    // Two neighbouring signs as two numbers +-1.
    static QEXP_DEVICE uint32_t signed_ones(uint32_t two) {
        constexpr uint32_t kOne = x_type == QEXP_BF16 ? 0x3F803F80u : 0x3C003C00u;
        return kOne ^ ((two & 1u) << 15) ^ ((two & 2u) << 30);
    }

    // values[matrix][a][columns] = sum_b H[a][b] raw[matrix][b][columns], for 32 columns of one matrix.
    static QEXP_DEVICE void mix(const Args& p, const Block& block, const char* raw, const uint32_t* signs, int matrix,
                                int strip0) {
        const int order = p.r.order, lane = simt::thread() % 32, strips = 1 << (p.power - 3), steps = (order + 15) / 16;
        const int start = matrix * p.r.width;
        QEXP_NO_UNROLL
        for (int top = 0; top < order; top += 16) {
            float sum[4][4] = {};
            const int row = top + lane / 4, upper = row < order ? row : 0, lower = row + 8 < order ? row + 8 : 0;
            QEXP_NO_UNROLL
            for (int step = 0; step < steps; ++step) {
                const int shift = 16 * (step & 1) + 2 * (lane & 3);
                const uint32_t high = signs[upper * block.plan.sign_words + step / 2] >> shift;
                const uint32_t low = signs[lower * block.plan.sign_words + step / 2] >> shift;
                const uint32_t a[4] = {signed_ones(high), signed_ones(low), signed_ones(high >> 8),
                                       signed_ones(low >> 8)};
                const int k = 16 * step + lane / 8 % 2 * 8 + lane % 8;
                QEXP_UNROLL
                for (int pair = 0; pair < 2; ++pair) {
                    const int strip = strip0 + 2 * pair + lane / 16;
                    const int chunk = raw_chunk(p, start / 8 + k * strips + strip);
                    const char* from =
                        k < order && strip < strips ? raw + chunk * 16 : block.shared + block.plan.zeros();
                    uint32_t b[4];
                    simt::load_matrices_transposed(b, from);
                    for (int side = 0; side < 2; ++side) {
                        if constexpr (x_type == QEXP_BF16)
                            simt::mma_bf16(sum[2 * pair + side], a, b[2 * side], b[2 * side + 1]);
                        else
                            simt::mma_half(sum[2 * pair + side], a, b[2 * side], b[2 * side + 1]);
                    }
                }
            }
            QEXP_UNROLL
            for (int j = 0; j < 4; ++j)
                for (int c = 0; c < 4; ++c) {
                    const int a = top + lane / 4 + 8 * (c >> 1), column = 8 * (strip0 + j) + 2 * (lane & 3) + (c & 1);
                    if (a < order && strip0 + j < strips)
                        block.values()[scattered(start + (a << p.power) + column)] = sum[j][c];
                }
        }
    }

    static QEXP_DEVICE void dense(const Args& p, const Block& block, int thread_count) {
        char* raw = block.shared + block.plan.raw(p);
        uint32_t* signs = reinterpret_cast<uint32_t*>(block.shared + block.plan.signs());
        load_raw(p, block, raw, signs, thread_count);
        const int across = p.power > 5 ? 1 << (p.power - 5) : 1, matrices = block.plan.elements / p.r.width;
        QEXP_NO_UNROLL
        for (int item = simt::thread() / 32; item < matrices * across; item += thread_count / 32)
            mix(p, block, raw, signs, item / across, item % across * 4);
        simt::sync();
    }

    // ---- butterflies --------------------------------------------------------------------------------------------

    // One stage over the bit `bit` of the position in v.
    template <int bit>
    static QEXP_DEVICE void butterfly(float (&v)[kUnit]) {
        QEXP_UNROLL
        for (int i = 0; i < kUnit; ++i)
            if ((i >> bit & 1) == 0) {
                const float a = v[i], b = v[i | 1 << bit];
                v[i] = a + b;
                v[i | 1 << bit] = a - b;
            }
    }

    // Stages over index bits lo + 0..3 (those in `active`) of 16 pairs of neighbours; pair and stage bits are v's.
    static QEXP_DEVICE void window(const Args& p, const Block& block, int lo, int active, bool from_x) {
        const int unit = simt::thread();
        const bool present = unit * kUnit < block.plan.elements;
        const int low = (1 << (lo - 1)) - 1, first = (unit >> (lo - 1)) << (lo + 4) | (unit & low) << 1;
        float v[kUnit];
        if (present && from_x) {
            load_pairs(p, block, first, lo, v);
        } else if (present) {
            QEXP_UNROLL
            for (int s = 0; s < 16; ++s) {
                const float* pair = block.values() + scattered(first + (s << lo));
                v[2 * s] = pair[0], v[2 * s + 1] = pair[1];
            }
        }
        if (active & 1) butterfly<1>(v);
        if (active & 2) butterfly<2>(v);
        if (active & 4) butterfly<3>(v);
        if (active & 8) butterfly<4>(v);
        if (present) {
            QEXP_UNROLL
            for (int s = 0; s < 16; ++s) {
                float* pair = block.values() + scattered(first + (s << lo));
                pair[0] = v[2 * s], pair[1] = v[2 * s + 1];
            }
        }
        simt::sync();
    }

    static QEXP_DEVICE void load_pairs(const Args& p, const Block& block, int first, int lo, float (&v)[kUnit]) {
        const bool valid = first < block.valid;  // a unit lies in one row
        const int64_t at = block.row0 * p.r.n + first;
        QEXP_UNROLL
        for (int s = 0; s < 16; ++s) {
            if constexpr (k16) {
                const uint32_t* from = static_cast<const uint32_t*>(p.r.x) + at / 2 + ((s << lo) >> 1);
                const uint32_t two = valid ? simt::load(from) : 0u;
                v[2 * s] = widen(two & 0xFFFFu), v[2 * s + 1] = widen(two >> 16);
            } else {
                const auto* from =
                    reinterpret_cast<const simt::Words2*>(static_cast<const float*>(p.r.x) + at + (s << lo));
                const simt::Words2 two = valid ? simt::load(from) : simt::Words2{};
                v[2 * s] = simt::float_of(two.word[0]), v[2 * s + 1] = simt::float_of(two.word[1]);
            }
        }
    }

    // 32 neighbours, from shared memory or straight from x.
    static QEXP_DEVICE void load_unit(const Args& p, const Block& block, float (&v)[kUnit]) {
        const int first = simt::thread() * kUnit;
        if (block.plan.exchange) {
            if (first < block.plan.elements) {
                QEXP_UNROLL
                for (int i = 0; i < kUnit; i += 4) {
                    const auto four = *reinterpret_cast<const simt::Words4*>(block.values() + scattered(first + i));
                    for (int e = 0; e < 4; ++e) v[i + e] = simt::float_of(four.word[e]);
                }
            }
            return;
        }
        constexpr int kEach = k16 ? 8 : 4;
        const auto* x = reinterpret_cast<const simt::Words4*>(static_cast<const char*>(p.r.x) +
                                                              (block.row0 * p.r.n + first) * (k16 ? 2 : 4));
        QEXP_UNROLL
        for (int i = 0; i < kUnit / kEach; ++i) {
            const simt::Words4 four = first < block.valid ? simt::load(x + i) : simt::Words4{};
            for (int e = 0; e < 4; ++e) {
                if constexpr (k16) {
                    v[i * 8 + 2 * e] = widen(four.word[e] & 0xFFFFu), v[i * 8 + 2 * e + 1] = widen(four.word[e] >> 16);
                } else {
                    v[i * 4 + e] = simt::float_of(four.word[e]);
                }
            }
        }
    }

    static QEXP_DEVICE void rotate(const Args& p, const Block& block, float (&v)[kUnit], int thread_count) {
        bool from_x = true;
        if (block.plan.dense) {
            if constexpr (k16) dense(p, block, thread_count);
            from_x = false;
        }
        if (p.power > 5) {
            const int lo = p.power - 4, done = lo < 5 ? 5 - lo : 0;  // bits below 5 are the last pass's
            window(p, block, lo, 15 >> done << done, from_x);
            QEXP_NO_UNROLL
            for (int next = 5; next < lo; next += 4)
                window(p, block, next, lo - next >= 4 ? 15 : (1 << (lo - next)) - 1, false);
        }
        load_unit(p, block, v);
        if (p.power > 0) butterfly<0>(v);
        if (p.power > 1) butterfly<1>(v);
        if (p.power > 2) butterfly<2>(v);
        if (p.power > 3) butterfly<3>(v);
        if (p.power > 4) butterfly<4>(v);
    }

    // ---- quantization -------------------------------------------------------------------------------------------

    struct Scale {
        float scale, step;  // of a code; codes are round(value * step), 0 for a group that is zero or not finite
    };

    // Magnitudes are compared as integers: Inf and NaN are the largest, and no order of operands can lose a NaN.
    static QEXP_DEVICE Scale scale_of(const Args& p, uint32_t magnitude) {
        if (magnitude >= 0x7F800000u) return {simt::float_of(0x7FC00000u), 0.0f};
        const float amax = simt::multiply(simt::float_of(magnitude), p.r.factor);
        if (amax == 0.0f) return {0.0f, 0.0f};
        const float top = p.r.bits == 4 ? 7.0f : 127.0f, least = 1.17549435e-38f;  // below, 1 / scale is not finite
        const float raw = simt::divide(simt::multiply(amax, p.r.clip), top), scale = raw < least ? least : raw;
        return {scale, simt::multiply(simt::divide(1.0f, scale), p.r.factor)};
    }

    // The warp's units all add to one slot: one atomic instead of 32.
    static QEXP_DEVICE bool same_slot(int slot_units) {
        const int first = simt::thread() / 32 * 32;
        return first / slot_units == (first + 31) / slot_units;
    }

    static QEXP_DEVICE void find_maximum(const Args& p, const Block& block, const float (&v)[kUnit], bool present) {
        uint32_t largest = 0;
        if (present) {
            QEXP_UNROLL
            for (int i = 0; i < kUnit; ++i) {
                const uint32_t magnitude = simt::bits_of(v[i]) & 0x7FFFFFFFu;
                largest = largest > magnitude ? largest : magnitude;
            }
        }
        const int slot = simt::thread() / (p.r.group / kUnit);
        if (same_slot(p.r.group / kUnit)) {
            largest = simt::reduce_max(largest);
            if (simt::thread() % 32 == 0 && present) simt::atomic_max(block.maxima() + slot, largest);
        } else if (present) {
            simt::atomic_max(block.maxima() + slot, largest);
        }
    }

    static QEXP_DEVICE void add_sum(const Args& p, const Block& block, int sum, bool present) {
        const int slot = simt::thread() / (p.r.sum_group / kUnit);
        if (same_slot(p.r.sum_group / kUnit)) {
            sum = simt::reduce_add(present ? sum : 0);
            if (simt::thread() % 32 == 0 && present) simt::atomic_add(block.sums() + slot, sum);
        } else if (present) {
            simt::atomic_add(block.sums() + slot, sum);
        }
    }

    // Rounds 32 values and stores their codes; returns the sum of the codes.
    static QEXP_DEVICE int write_codes(const Args& p, const Block& block, const float (&v)[kUnit], float step,
                                       bool stored) {
        const float top = p.r.bits == 4 ? 7.0f : 127.0f;
        uint32_t bytes[kUnit / 4], sum = 0;
        QEXP_UNROLL
        for (int i = 0; i < kUnit; i += 4) {
            uint32_t code[4];
            for (int e = 0; e < 4; ++e) {
                // Clamping before rounding is the same: the limits are integers. A NaN (of a group with step 0) is -top
                // - 1.
                const float scaled = simt::multiply(v[i + e], step), over = scaled > -top - 1.0f ? scaled : -top - 1.0f;
                code[e] = step == 0.0f ? static_cast<uint32_t>(kMagicBits) : to_magic(over < top ? over : top);
                sum += code[e] - static_cast<uint32_t>(kMagicBits);
            }
            bytes[i / 4] =
                simt::permute(simt::permute(code[0], code[1], 0x0040), simt::permute(code[2], code[3], 0x0040), 0x5410);
        }
        const int64_t at = block.row0 * p.r.n + simt::thread() * kUnit;
        if (!stored) return 0;
        if (p.r.packed) {
            simt::Words4 nibbles;
            QEXP_UNROLL
            for (int w = 0; w < 4; ++w) {
                const uint32_t low = bytes[2 * w] & 0x0F0F0F0Fu, high = bytes[2 * w + 1] & 0x0F0F0F0Fu;
                nibbles.word[w] = simt::permute(low | low >> 4, high | high >> 4, 0x6420);
            }
            *reinterpret_cast<simt::Words4*>(static_cast<char*>(p.r.out) + at / 2) = nibbles;
        } else {
            auto* out = reinterpret_cast<simt::Words4*>(static_cast<char*>(p.r.out) + at);
            out[0] = {{bytes[0], bytes[1], bytes[2], bytes[3]}};
            out[1] = {{bytes[4], bytes[5], bytes[6], bytes[7]}};
        }
        return static_cast<int>(sum);
    }

    static QEXP_DEVICE void write_values(const Args& p, const Block& block, const float (&v)[kUnit], bool stored) {
        if (!stored) return;
        constexpr int kEach = k16 ? 8 : 4;
        auto* out = reinterpret_cast<simt::Words4*>(static_cast<char*>(p.r.out) +
                                                    (block.row0 * p.r.n + simt::thread() * kUnit) * (k16 ? 2 : 4));
        QEXP_UNROLL
        for (int i = 0; i < kUnit / kEach; ++i) {
            simt::Words4 four;
            for (int e = 0; e < 4; ++e) {
                if constexpr (k16) {
                    const uint32_t low = narrow(simt::multiply(v[8 * i + 2 * e], p.r.factor));
                    four.word[e] = low | narrow(simt::multiply(v[8 * i + 2 * e + 1], p.r.factor)) << 16;
                } else {
                    four.word[e] = simt::bits_of(simt::multiply(v[4 * i + e], p.r.factor));
                }
            }
            out[i] = four;
        }
    }

    static QEXP_DEVICE void run(const Args& p, void* shared) {
        const Block block(p, shared);
        const int first = simt::thread() * kUnit;
        const int thread_count = (block.plan.elements / kUnit + 31) / 32 * 32;
        const bool present = first < block.plan.elements, stored = first < block.valid;
        if constexpr (quantize) {
            for (int i = simt::thread(); i < block.plan.slots; i += thread_count) block.maxima()[i] = 0;
            for (int i = simt::thread(); i < block.plan.sum_slots; i += thread_count) block.sums()[i] = 0;
            if (!block.plan.exchange) simt::sync();  // else a pass over shared memory orders them
        }
        float v[kUnit];
        rotate(p, block, v, thread_count);
        if constexpr (!quantize) {
            write_values(p, block, v, stored);
        } else {
            find_maximum(p, block, v, present);
            simt::sync();
            const Scale scale = scale_of(p, present ? block.maxima()[first / p.r.group] : 0u);
            add_sum(p, block, write_codes(p, block, v, scale.step, stored), present);
            simt::sync();
            const int64_t slot0 = block.row0 * (p.r.n / p.r.group), sum0 = block.row0 * (p.r.n / p.r.sum_group);
            for (int i = simt::thread(); i < block.valid / p.r.group; i += thread_count)
                p.r.scale[slot0 + i] = scale_of(p, block.maxima()[i]).scale;
            for (int i = simt::thread(); i < block.valid / p.r.sum_group; i += thread_count)
                p.r.sums[sum0 + i] = block.sums()[i];
        }
    }
};

}  // namespace qexp::cuda
