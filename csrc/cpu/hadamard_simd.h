// The vector tiers of hadamard.h, written once over the vectors V of vec_avx512.h or vec_avx2.h.
//
// A row is worked on in fp32, in memory that stays in cache, as pairs of vectors (even, odd elements). First pass:
// load, convert and all butterflies that fit in registers (256 columns with AVX-512). Then strided passes of up to 16
// rows of vectors, then H_K' if there is one. The last of these also takes the largest magnitude, as an unsigned
// integer, so that NaN and Inf come out on top. The final pass scales, rounds and packs. Rows of one register block
// never touch memory in between.
#pragma once

#include <type_traits>

#include "hadamard.h"
#include "hadamard_scale.h"

// A body that stays a call would send its arrays of vectors through memory.
#define QEXP_INLINE __attribute__((always_inline))

namespace {

using qexp::HadamardTask;
using qexp::HadQuantTask;
using qexp::Rotation;

constexpr int log2_of(int value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }

// Calls body(integral_constant<0>), body(integral_constant<1>), ..: an unrolling the compiler cannot refuse.
template <int Count, int Start = 0, typename Body>
inline QEXP_INLINE void unroll(Body&& body) {
    if constexpr (Start < Count) {
        body(std::integral_constant<int, Start>{});
        unroll<Count, Start + 1>(body);
    }
}

// Calls body(integral_constant<value>) for a value in [Least, Most] known only at run time.
template <int Least, int Most, typename Body>
inline void with_constant(int value, Body&& body) {
    if constexpr (Least <= Most) {
        if (value == Least) {
            body(std::integral_constant<int, Least>{});
        } else {
            with_constant<Least + 1, Most>(value, body);
        }
    }
}

// Narrower serves the shapes that V does not divide.
template <class V, const qexp::HadamardKernels& Narrower>
struct HadamardRows {
    using F = typename V::F;
    using I = typename V::I;
    using Pair = typename V::Pair;
    static constexpr int kPair = 2 * V::lanes;
    static constexpr int kPairBits = log2_of(kPair);
    static constexpr int kFirstBits = kPairBits + log2_of(V::max_pairs);  // butterflies of the first pass
    static constexpr int kRadixBits = V::radix_bits;

    // --- butterflies in registers

    // All butterflies of the first Bits strides inside a pair.
    template <int Bits>
    static inline QEXP_INLINE void inside(Pair& v) {
        if constexpr (Bits > 0) v = {V::add(v.even, v.odd), V::sub(v.even, v.odd)};
        unroll<log2_of(V::lanes)>([&](auto s) QEXP_INLINE {
            if constexpr (Bits > s.value + 1) {
                v.even = V::template butterfly<1 << s.value>(v.even);
                v.odd = V::template butterfly<1 << s.value>(v.odd);
            }
        });
    }

    // Butterflies between Count registers: strides 1, 2, 4, .. of the array.
    template <int Count>
    static inline QEXP_INLINE void between(F (&v)[Count]) {
        unroll<log2_of(Count)>([&](auto s) QEXP_INLINE {
            constexpr int stride = 1 << s.value;
            unroll<Count>([&](auto k) QEXP_INLINE {
                if constexpr ((k.value & stride) == 0) {
                    const F a = v[k.value], b = v[k.value + stride];
                    v[k.value] = V::add(a, b);
                    v[k.value + stride] = V::sub(a, b);
                }
            });
        });
    }

    // Loads one block of max(1, 2^Bits / kPair) pairs and does its first Bits strides; v = even, odd, even, odd, ..
    template <int Bits, typename T, int Count>
    static inline QEXP_INLINE void load_block(const T* x, F (&v)[Count]) {
        constexpr int pairs = Count / 2;
        F even[pairs], odd[pairs];
        unroll<pairs>([&](auto p) QEXP_INLINE {
            Pair pair = V::load_pair(x + p.value * kPair);
            inside<Bits>(pair);
            even[p.value] = pair.even;
            odd[p.value] = pair.odd;
        });
        between(even);
        between(odd);
        unroll<pairs>([&](auto p) QEXP_INLINE {
            v[2 * p.value] = even[p.value];
            v[2 * p.value + 1] = odd[p.value];
        });
    }

    template <int Bits>
    static constexpr int block_vectors = Bits <= kPairBits ? 2 : 2 << (Bits - kPairBits);

    template <int Count>
    static inline QEXP_INLINE I largest(const F (&v)[Count], I most) {
        unroll<Count>([&](auto k) QEXP_INLINE { most = V::umax(most, V::magnitude(v[k.value])); });
        return most;
    }

    // --- passes over the work space

    // work [n] <- x with the first Bits strides done; the largest magnitude if Most.
    template <int Bits, bool Most, typename T>
    static void first_pass(const T* x, int64_t n, float* work, I& most) {
        constexpr int vectors = block_vectors<Bits>;
        I top = most;
        for (int64_t i = 0; i < n; i += vectors * V::lanes) {
            F v[vectors];
            load_block<Bits>(x + i, v);
            if constexpr (Most) top = largest(v, top);
            unroll<vectors>([&](auto k) QEXP_INLINE { V::store(work + i + k.value * V::lanes, v[k.value]); });
        }
        most = top;
    }

    // The Bits strides stride, 2 stride, .. of every block of 2^Bits stride columns.
    template <int Bits, bool Most>
    static void strided_pass(float* work, int64_t n, int64_t stride, I& most) {
        constexpr int count = 1 << Bits;
        I top = most;
        for (int64_t base = 0; base < n; base += count * stride) {
            for (int64_t j = base; j < base + stride; j += V::lanes) {
                F v[count];
                unroll<count>([&](auto k) QEXP_INLINE { v[k.value] = V::load(work + j + k.value * stride); });
                between(v);
                if constexpr (Most) top = largest(v, top);
                unroll<count>([&](auto k) QEXP_INLINE { V::store(work + j + k.value * stride, v[k.value]); });
            }
        }
        most = top;
    }

    // The strides that the first pass of one block of 2^power columns left.
    template <bool Most>
    static void strided_passes(float* work, int power, I& most) {
        int done = kFirstBits, passes = (power - done + kRadixBits - 1) / kRadixBits;
        for (; passes > 0; --passes) {
            const int bits = (power - done + passes - 1) / passes;
            with_constant<1, kRadixBits>(bits, [&](auto b) {
                if (passes == 1) {
                    strided_pass<b.value, Most>(work, int64_t{1} << power, int64_t{1} << done, most);
                } else {
                    strided_pass<b.value, false>(work, int64_t{1} << power, int64_t{1} << done, most);
                }
            });
            done += bits;
        }
    }

    // All butterflies of blocks of 2^power columns; the largest magnitude if Most. A block is finished before the next.
    template <bool Most, typename T>
    static void butterflies(const T* x, int64_t n, int power, float* work, I& most) {
        if (power > kFirstBits) {
            const int64_t width = int64_t{1} << power;
            for (int64_t base = 0; base < n; base += width) {
                first_pass<kFirstBits, false>(x + base, width, work + base, most);
                strided_passes<Most>(work + base, power, most);
            }
        } else {
            with_constant<0, kFirstBits>(power, [&](auto b) { first_pass<b.value, Most>(x, n, work, most); });
        }
    }

    // --- H_K'

    // table [groups][8][W]: the signed sums of every four inputs that begin with + (inputs past the last count as 0), W
    // vectors of columns each; inputs are columns apart. Half of all sixteen: stores are what this costs.
    template <int W>
    static void fill_table(const float* inputs, int64_t columns, int64_t count, float* table) {
        for (; count > 0; count -= 4, inputs += 4 * columns, table += 8 * W * V::lanes) {
            unroll<W>([&](auto w) QEXP_INLINE {
                F v[4];
                unroll<4>([&](auto t) QEXP_INLINE {
                    v[t.value] = t.value < count ? V::load(inputs + t.value * columns + w.value * V::lanes) : V::zero();
                });
                const F ab[2] = {V::add(v[0], v[1]), V::sub(v[0], v[1])};
                const F cd[2] = {V::add(v[2], v[3]), V::sub(v[2], v[3])};
                unroll<8>([&](auto k) QEXP_INLINE {
                    const F a = ab[k.value & 1], b = cd[(k.value >> 1) & 1];
                    V::store(table + (k.value * W + w.value) * V::lanes, k.value & 4 ? V::sub(a, b) : V::add(a, b));
                });
            });
        }
    }

    struct Strip {
        const Rotation* rotation;
        float* block;     // first column of the strip in row 0
        int64_t columns;  // between rows
        float* table;
        float* totals;  // [order][W] vectors between chunks of groups
    };

    // One output row of a strip, with the groups of one chunk: those that are added, then those that are subtracted.
    template <int W, bool Most>
    static inline QEXP_INLINE void output(const Strip& s, int64_t i, int64_t chunk, I& most) {
        const Rotation& r = *s.rotation;
        const bool last = chunk + 1 == r.chunks();
        const int64_t count = last ? r.groups() - chunk * Rotation::kChunk : Rotation::kChunk;
        const uint8_t* pick = r.picks + i * r.groups() + chunk * Rotation::kChunk;
        const uint8_t* const negative = pick + r.positives[i * r.chunks() + chunk];
        const uint8_t* const end = pick + count;
        float* kept = s.totals + i * W * V::lanes;
        F total[W];
        unroll<W>([&](auto w) QEXP_INLINE { total[w.value] = chunk ? V::load(kept + w.value * V::lanes) : V::zero(); });
        for (; pick < negative; ++pick) {
            const float* sum = s.table + *pick * (W * V::lanes);
            unroll<W>([&](auto w) QEXP_INLINE {
                total[w.value] = V::add(total[w.value], V::load(sum + w.value * V::lanes));
            });
        }
        for (; pick < end; ++pick) {
            const float* sum = s.table + *pick * (W * V::lanes);
            unroll<W>([&](auto w) QEXP_INLINE {
                total[w.value] = V::sub(total[w.value], V::load(sum + w.value * V::lanes));
            });
        }
        if constexpr (Most) {
            if (last) most = largest(total, most);
        }
        float* const to = last ? s.block + i * s.columns : kept;
        unroll<W>([&](auto w) QEXP_INLINE { V::store(to + w.value * V::lanes, total[w.value]); });
    }

    template <int W, bool Most>
    static void mix_strip(const Strip& s, I& most) {
        constexpr int64_t inputs = 4 * Rotation::kChunk;
        const int64_t order = s.rotation->order;
        I top = most;
        for (int64_t chunk = 0; chunk < s.rotation->chunks(); ++chunk) {
            const int64_t left = order - chunk * inputs;
            fill_table<W>(s.block + chunk * inputs * s.columns, s.columns, left < inputs ? left : inputs, s.table);
            for (int64_t i = 0; i < order; ++i) output<W, Most>(s, i, chunk, top);
        }
        most = top;
    }

    template <int W, bool Most>
    static void mix_strips(float* work, int64_t n, const Rotation& rotation, float* scratch, I& most) {
        const int64_t columns = int64_t{1} << rotation.power;
        float* const totals = scratch + Rotation::kChunk * 8 * W * V::lanes;
        for (int64_t base = 0; base < n; base += rotation.width()) {
            for (int64_t c = 0; c < columns; c += W * V::lanes) {
                mix_strip<W, Most>({&rotation, work + base + c, columns, scratch, totals}, most);
            }
        }
    }

    // Every block of work [order][2^power] <- H_K' block. Wide strips need the columns and a table that stays in cache.
    template <bool Most>
    static void mix(float* work, int64_t n, const Rotation& rotation, float* scratch, I& most) {
        if (rotation.groups() <= 8 && (int64_t{1} << rotation.power) >= 4 * V::lanes) {
            mix_strips<4, Most>(work, n, rotation, scratch, most);
        } else {
            mix_strips<2, Most>(work, n, rotation, scratch, most);
        }
    }

    // work [n] <- the row rotated, not normalised.
    template <bool Most, typename T>
    static void rotate(const T* x, int64_t n, const Rotation& rotation, float* work, I& most) {
        if (rotation.order == 1) {
            butterflies<Most>(x, n, rotation.power, work, most);
        } else {
            butterflies<false>(x, n, rotation.power, work, most);
            mix<Most>(work, n, rotation, work + n, most);
        }
    }

    // --- quantization

    static inline QEXP_INLINE Pair work_pair(const float* work) {
        return {V::load(work), V::load(work + V::lanes)};
    }

    template <bool Clamp>
    static inline QEXP_INLINE I code(F v, F step, F low, F high) {
        v = V::mul(v, step);
        if constexpr (Clamp) v = V::min(V::max(v, low), high);
        return V::to_int(v);
    }

    // Codes of count columns; StoredBits is 4 for nibbles, 8 for bytes. Source(i) returns the pair at column i.
    template <int StoredBits, bool Clamp, typename Source>
    static inline QEXP_INLINE int32_t encode(Source source, int64_t count, float step, float top,
                                                                uint8_t* q) {
        const F by = V::set(step), low = V::set(-top - 1.0f), high = V::set(top);
        I sum = V::izero();
        for (int64_t i = 0; i < count; i += kPair) {
            const Pair v = source(i);
            const I even = code<Clamp>(v.even, by, low, high), odd = code<Clamp>(v.odd, by, low, high);
            sum = V::iadd(sum, V::iadd(even, odd));
            V::template store_codes<StoredBits>(q + i * StoredBits / 8, even, odd);
        }
        return V::reduce_add(sum);
    }

    template <typename Source>
    static inline QEXP_INLINE int32_t encode(const HadQuantTask& task, Source source, int64_t count,
                                                                const Scale& scale, uint8_t* q) {
        if (!scale.good) {
            const int64_t bytes = task.packed ? count / 2 : count;
            for (int64_t i = 0; i < bytes; ++i) q[i] = 0;
            return 0;
        }
        const float top = static_cast<float>((1 << (task.bits - 1)) - 1);
        if (task.clip < 1.0f) {
            return task.packed ? encode<4, true>(source, count, scale.step, top, q)
                               : encode<8, true>(source, count, scale.step, top, q);
        }
        return task.packed ? encode<4, false>(source, count, scale.step, top, q)
                           : encode<8, false>(source, count, scale.step, top, q);
    }

    template <typename Source>
    static I largest_of(Source source, int64_t count) {
        I most = V::izero();
        for (int64_t i = 0; i < count; i += kPair) {
            const Pair v = source(i);
            most = V::umax(most, V::umax(V::magnitude(v.even), V::magnitude(v.odd)));
        }
        return most;
    }

    // One row whose values Source gives. `most` is the magnitude of the row, used if one scale serves all of it.
    template <typename Source>
    static void quantize_row(const HadQuantTask& task, int64_t r, Source source, uint32_t most) {
        const int64_t n = task.n, scales = n / task.group, sums = n / task.sum_group;
        const int64_t step = task.group < task.sum_group ? task.group : task.sum_group;
        uint8_t* q = task.q + r * (task.packed ? n / 2 : n);
        for (int64_t i = 0; i < sums; ++i) task.sums[r * sums + i] = 0;
        Scale scale{};
        for (int64_t i = 0; i < n; i += step) {
            if (i % task.group == 0) {
                const auto here = [&](int64_t j) { return source(i + j); };
                if (scales > 1) most = V::reduce_umax(largest_of(here, task.group));
                scale = scale_of(most, task.norm, task.clip, task.bits);
                task.scale[r * scales + i / task.group] = scale.scale;
            }
            const auto part = [&](int64_t j) { return source(i + j); };
            task.sums[r * sums + i / task.sum_group] += encode(task, part, step, scale, q + (task.packed ? i / 2 : i));
        }
    }

    template <typename T>
    static void quant_row(const HadQuantTask& task, const T* x, int64_t r, float* work) {
        const bool whole = task.group == task.n;
        I most = V::izero();
        if (task.rotation.width() == 1) {
            const auto source = [x](int64_t i) { return V::load_pair(x + i); };
            if (whole) most = largest_of(source, task.n);
            return quantize_row(task, r, source, V::reduce_umax(most));
        }
        if (whole) {
            rotate<true>(x, task.n, task.rotation, work, most);
        } else {
            rotate<false>(x, task.n, task.rotation, work, most);
        }
        const T* next = r + 1 < task.rows ? x + task.row_stride : x;
        const auto source = [work, next](int64_t i) {
            __builtin_prefetch(next + i, 0, 2);  // memory would idle while this row is in cache: to L2 with the next
            return work_pair(work + i);
        };
        quantize_row(task, r, source, V::reduce_umax(most));
    }

    template <int StoredBits, bool Clamp, int Count>
    static inline QEXP_INLINE int32_t encode_block(const F (&v)[Count], float step, float top,
                                                                      uint8_t* q) {
        const F by = V::set(step), low = V::set(-top - 1.0f), high = V::set(top);
        I sum = V::izero();
        unroll<Count / 2>([&](auto p) QEXP_INLINE {
            const I even = code<Clamp>(v[2 * p.value], by, low, high);
            const I odd = code<Clamp>(v[2 * p.value + 1], by, low, high);
            sum = V::iadd(sum, V::iadd(even, odd));
            V::template store_codes<StoredBits>(q + p.value * (kPair * StoredBits / 8), even, odd);
        });
        return V::reduce_add(sum);
    }

    // Rows that are one register block with one scale and one sum.
    template <int Bits, int StoredBits, bool Clamp, typename T>
    static void quant_blocks(const HadQuantTask& task, int64_t begin, int64_t end) {
        constexpr int vectors = block_vectors<Bits>, bytes = vectors * V::lanes * StoredBits / 8;
        const float top = static_cast<float>((1 << (task.bits - 1)) - 1);
        for (int64_t r = begin; r < end; ++r) {
            F v[vectors];
            load_block<Bits>(static_cast<const T*>(task.x) + r * task.row_stride, v);
            const Scale scale = scale_of(V::reduce_umax(largest(v, V::izero())), task.norm, task.clip, task.bits);
            task.scale[r] = scale.scale;
            uint8_t* q = task.q + r * bytes;
            if (scale.good) {
                task.sums[r] = encode_block<StoredBits, Clamp>(v, scale.step, top, q);
            } else {
                task.sums[r] = 0;
                for (int i = 0; i < bytes; ++i) q[i] = 0;
            }
        }
    }

    template <int Bits, typename T>
    static void quant_blocks(const HadQuantTask& task, int64_t begin, int64_t end) {
        if (task.clip < 1.0f) {
            return task.packed ? quant_blocks<Bits, 4, true, T>(task, begin, end)
                               : quant_blocks<Bits, 8, true, T>(task, begin, end);
        }
        return task.packed ? quant_blocks<Bits, 4, false, T>(task, begin, end)
                           : quant_blocks<Bits, 8, false, T>(task, begin, end);
    }

    // --- workers

    template <typename T>
    static void quant_rows(const HadQuantTask& task, int64_t begin, int64_t end, float* work) {
        const T* x = static_cast<const T*>(task.x);
        const bool single = task.rotation.order == 1 && task.rotation.width() == task.n && task.group == task.n &&
                            task.sum_group == task.n && task.rotation.power <= kFirstBits;
        if (single) {
            with_constant<kPairBits, kFirstBits>(
                task.rotation.power, [&](auto bits) { quant_blocks<bits.value, T>(task, begin, end); });
            return;
        }
        for (int64_t r = begin; r < end; ++r) quant_row(task, x + r * task.row_stride, r, work);
    }

    template <typename T>
    static void transform_rows(const HadamardTask& task, int64_t begin, int64_t end, float* work) {
        const F scale = V::set(task.scale);
        for (int64_t r = begin; r < end; ++r) {
            I unused = V::izero();
            rotate<false>(static_cast<const T*>(task.x) + r * task.row_stride, task.n, task.rotation, work, unused);
            T* y = static_cast<T*>(task.y) + r * task.n;
            for (int64_t i = 0; i < task.n; i += kPair) {
                const Pair v = work_pair(work + i);
                V::store_pair(y + i, {V::mul(v.even, scale), V::mul(v.odd, scale)});
            }
        }
    }

    // Whether vectors divide everything.
    static bool fits(const Rotation& rotation, int64_t n) {
        const bool columns = rotation.order == 1 || (int64_t{1} << rotation.power) % kPair == 0;
        return n % kPair == 0 && columns;
    }

    static void hadamard(const HadamardTask& task, int64_t begin, int64_t end, float* work) {
        if (!fits(task.rotation, task.n)) return Narrower.hadamard(task, begin, end, work);
        switch (task.dtype) {
            case qexp::Dtype::bf16:
                return transform_rows<Bf16>(task, begin, end, work);
            case qexp::Dtype::fp16:
                return transform_rows<Fp16>(task, begin, end, work);
            case qexp::Dtype::fp32:
                return transform_rows<float>(task, begin, end, work);
        }
    }

    static void had_quant(const HadQuantTask& task, int64_t begin, int64_t end, float* work) {
        const int64_t small = task.group < task.sum_group ? task.group : task.sum_group;
        const int64_t large = task.group < task.sum_group ? task.sum_group : task.group;
        const bool nested = small % kPair == 0 && large % small == 0;
        if (!fits(task.rotation, task.n) || !nested) {
            return Narrower.had_quant(task, begin, end, work);
        }
        switch (task.dtype) {
            case qexp::Dtype::bf16:
                return quant_rows<Bf16>(task, begin, end, work);
            case qexp::Dtype::fp16:
                return quant_rows<Fp16>(task, begin, end, work);
            case qexp::Dtype::fp32:
                return quant_rows<float>(task, begin, end, work);
        }
    }
};

}  // namespace
