#include "gemm_tiles.h"
#include "gemm_vec_avx512.h"

namespace qexp {
namespace {

// Weights as bf16, which holds -8..7 exactly, activations as they are. vdpbf16ps reads subnormals as zero.
struct Avx512Bf16 : Avx512 {
    using Element = uint16_t;
    static constexpr int kFloatRows = 8, kFloatBlocksFew = 4, kFloatBlocksMany = 2;

    // The nibble at bit `shift` of each half of a lane, as bf16: vpermw reads the low five bits of an index, and the
    // table holds its 16 values twice, so the fifth is ignored.
    static Bytes nibble_pair(Bytes v, int shift) {
        const __m256i table = _mm256_setr_epi16(0xC100 - 0x10000, 0xC0E0 - 0x10000, 0xC0C0 - 0x10000, 0xC0A0 - 0x10000,
                                                0xC080 - 0x10000, 0xC040 - 0x10000, 0xC000 - 0x10000, 0xBF80 - 0x10000,
                                                0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0);
        return _mm512_permutexvar_epi16(_mm512_srli_epi32(v, static_cast<unsigned>(shift)),
                                        _mm512_broadcast_i64x4(table));
    }
    static Bytes broadcast_pair(const uint16_t* p) { return broadcast4(reinterpret_cast<const int8_t*>(p)); }
    static void dot_pairs(Real& acc, Bytes w, Bytes x) {
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    }
};

}  // namespace

constexpr FloatKernels gemm_avx512bf16 = make_float_kernels<Avx512Bf16>();

}  // namespace qexp
