// What only sm_90a has: transaction barriers, the bulk copy engine, and matrix products of whole warpgroups. A file
// that includes this is compiled for sm_90a alone.
#pragma once

#include "simt.cuh"

#if !defined(__CUDACC__)
#include "emulator_sm90.h"
#else

namespace qexp::simt {

using Barrier = uint64_t;  // an mbarrier in shared memory
using TensorMap = CUtensorMap;

QEXP_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine; a block barrier must follow.
QEXP_DEVICE void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
QEXP_DEVICE void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// One arrival, and `bytes` more that copies will bring.
QEXP_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Waits for the completion of the phase of this parity.
QEXP_DEVICE void barrier_wait(Barrier* barrier, int parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\n"
        "bra again;\n"
        "ready: }" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

QEXP_DEVICE void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// The box of a tensor map at column x, row y; what lies outside of the tensor arrives as zeros.
QEXP_DEVICE void copy_box(void* to, const TensorMap* map, int x, int y, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
        : "memory");
}

template <int count>
QEXP_DEVICE void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
QEXP_DEVICE void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
// A barrier among `count` threads of a block; 0 is that of sync().
QEXP_DEVICE void sync_some(int barrier, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, transposed on the way: row i of matrix m goes to the address of lane 8 m + i.
QEXP_DEVICE void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// K-major s8 operand in rows of 128 bytes with the 128-byte swizzle, eight rows every 1024 bytes.
QEXP_DEVICE uint64_t operand_in_128(const void* tile) {
    constexpr uint64_t kSwizzle128 = 1, kStride = 1024 / 16;
    return kSwizzle128 << 62 | kStride << 32 | (shared_address(tile) & 0x3FFFFu) >> 4;
}

QEXP_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QEXP_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int newest>
QEXP_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(newest) : "memory");
}

#define QEXP_C4(j) "+r"(c[j][0]), "+r"(c[j][1]), "+r"(c[j][2]), "+r"(c[j][3])
#define QEXP_C16(j) QEXP_C4(j), QEXP_C4(j + 1), QEXP_C4(j + 2), QEXP_C4(j + 3)
#define QEXP_C64(j) QEXP_C16(j), QEXP_C16(j + 4), QEXP_C16(j + 8), QEXP_C16(j + 12)

// C[64 x 8 J] += A[64 x 32] B[32 x 8 J]: a lane's part of C is c_cell of J tiles, A is in registers (a_cell), B shared.
QEXP_DEVICE void wgmma_s8(int (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{ .reg .pred accumulate; setp.eq.u32 accumulate, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
        "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
        "%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, accumulate; }"
        : QEXP_C64(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
QEXP_DEVICE void wgmma_s8(int (&c)[32][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{ .reg .pred accumulate; setp.eq.u32 accumulate, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
        "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
        "%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,"
        "%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,"
        "%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
        "{%128,%129,%130,%131}, %132, accumulate; }"
        : QEXP_C64(0), QEXP_C64(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef QEXP_C4
#undef QEXP_C16
#undef QEXP_C64

// Describes a matrix of bytes [rows][columns] for copies of boxes of [box_rows][128] bytes with the 128-byte swizzle.
// The function lives in the driver; asking the runtime for it spares linking with libcuda. Returns 0 or an error.
inline int describe(TensorMap* map, const void* base, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult state{};
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &state);
        return state == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
    }();
    if (encode == nullptr) return -1;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
    const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(base), sizes, strides, box,
                                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? 0 : static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace qexp::simt

#endif  // __CUDACC__
