// The instructions that the kernels use, one thin function each: PTX when nvcc compiles, a lane-exact emulation on the
// host otherwise (emulator.h). Kernel bodies call nothing else of CUDA, so the same source runs on a machine without a
// GPU, where the tests check its index arithmetic, its barriers and its copies bit for bit.
//
// A kernel is a struct: `Args` (plain data), `threads`, `blocks_per_sm`, and `static void run(const Args&, void*
// shared)`.
#pragma once

#include "layout.h"

#if !defined(__CUDACC__)
#include "emulator.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define QEXP_DEVICE __device__ __forceinline__
#define QEXP_UNROLL _Pragma("unroll")
#define QEXP_NO_UNROLL _Pragma("unroll 1")
// Parameters stay in constant memory, where a tensor map may be read by the copy engine.
#define QEXP_PARAMETER __grid_constant__
// mma.sync with s4 operands exists in hardware up to sm_89; later chips emulate it, slower than the s8 kernels. Tests
// define QEXP_EMULATED_S4 to run it there all the same.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(QEXP_EMULATED_S4)
#define QEXP_NATIVE_S4 0
#else
#define QEXP_NATIVE_S4 1
#endif

namespace qexp::simt {

struct alignas(16) Words4 {
    uint32_t word[4];
};
struct alignas(8) Words2 {
    uint32_t word[2];
};

QEXP_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
QEXP_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
QEXP_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
QEXP_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
QEXP_DEVICE void sync() { __syncthreads(); }

QEXP_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
QEXP_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
QEXP_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }  // never contracted into an fma
QEXP_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
QEXP_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QEXP_DEVICE float from_bf16(uint32_t low) { return __uint_as_float(low << 16); }
QEXP_DEVICE float from_half(uint32_t low) { return __half2float(__ushort_as_half(static_cast<uint16_t>(low))); }
QEXP_DEVICE uint32_t to_bf16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
QEXP_DEVICE uint32_t to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

// Two roundings in one instruction; `low` goes to the low half.
QEXP_DEVICE uint32_t to_bf16x2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
QEXP_DEVICE uint32_t to_half2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// Two 16-bit numbers minus two others.
QEXP_DEVICE uint32_t subtract_bf16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("{ .reg .b32 one; mov.b32 one, 0xBF80BF80; fma.rn.bf16x2 %0, %2, one, %1; }" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
QEXP_DEVICE uint32_t subtract_half2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// Bytes of the eight in (high, low) picked by the nibbles of `pick`.
QEXP_DEVICE uint32_t permute(uint32_t low, uint32_t high, uint32_t pick) { return __byte_perm(low, high, pick); }

QEXP_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }
QEXP_DEVICE uint32_t reduce_max(uint32_t value) { return __reduce_max_sync(0xFFFFFFFFu, value); }
QEXP_DEVICE int reduce_add(int value) { return __reduce_add_sync(0xFFFFFFFFu, value); }
QEXP_DEVICE void atomic_max(uint32_t* shared, uint32_t value) { atomicMax(shared, value); }
QEXP_DEVICE void atomic_add(int* shared, int value) { atomicAdd(shared, value); }

QEXP_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, zeros if not valid (the source is then not read, but must be a real address).
QEXP_DEVICE void copy_async(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
QEXP_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int newest>
QEXP_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Weights are read once: past L1, first to leave L2.
QEXP_DEVICE Words4 load_once(const void* from) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(from), "l"(policy));
    return v;
}
template <class T>
QEXP_DEVICE T load(const T* from) {
    return __ldg(from);
}
QEXP_DEVICE Words2 load(const Words2* from) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
    return {{v.x, v.y}};
}
QEXP_DEVICE Words4 load(const Words4* from) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    return {{v.x, v.y, v.z, v.w}};
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
QEXP_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
QEXP_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// C[16 x 8] += A[16 x K] B[K x 8], operands as in layout.h.
QEXP_DEVICE void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
QEXP_DEVICE void mma_s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if QEXP_NATIVE_S4
    asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();
#endif
}
QEXP_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
QEXP_DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::blocks_per_sm)
    entry(const QEXP_PARAMETER typename Kernel::Args args) {
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(args, shared);
}

// 90 for compute capability 9.0.
inline int compute_capability() {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return 10 * major + minor;
}

// Starts a kernel; returns the CUDA error, 0 for none, -1 (QEXP_UNSUPPORTED) if the chip has less shared memory than
// asked for. `threads` may be fewer than the kernel was compiled for.
template <class Kernel>
int launch(int64_t grid_x, int64_t grid_y, int threads, int shared_bytes, void* stream,
           const typename Kernel::Args& args) {
    if (shared_bytes > 48 * 1024) {
        int device = 0, most = 0;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (shared_bytes > most) return -1;
        const cudaError_t error =
            cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess) return static_cast<int>(error);
    }
    const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
    entry<Kernel><<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace qexp::simt

#endif  // __CUDACC__
