/* C ABI of libqexp_cuda.so: device pointers, sizes and a stream; no torch, no C++ in the interface.
 *
 * Every function returns 0, a positive CUDA error code, or QEXP_UNSUPPORTED where no kernel covers the arguments (the
 * caller then uses another path). Checks of dtypes and shapes belong to the caller (qexp/kernels/cuda.py). */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
#define QEXP_API extern "C" __attribute__((visibility("default")))
#else
#define QEXP_API
#endif

enum { QEXP_UNSUPPORTED = -1 };
enum { QEXP_F32 = 0, QEXP_BF16 = 1, QEXP_F16 = 2, QEXP_I32 = 3 };          /* types of numbers */
enum { QEXP_TILE = 0, QEXP_DECODE = 1, QEXP_WGMMA = 2, QEXP_TILE_S4 = 3 }; /* kernels of the integer product */

/* out [m, n] = a_scale[m] (sum over groups of scale[g][n] times the integer product, minus zero[g][n] a_sums[m][g])
 * + bias[n]. The same description serves all products; what one does not use is null. */
struct QexpProduct {
    const uint8_t* w;      /* layout w4_tile of layout.h: [n_padded / 16][k_padded / 64][512] */
    const float* scale;    /* [groups][n_padded], n_padded = n rounded up to 128; groups = 1 if group = 0 */
    const float* inner;    /* two-level groups: [k / group][n_padded] integers 1..15; scale is then [1][n_padded] */
    const float* zero;     /* scale times zero point, [groups][n_padded] */
    const void* a;         /* s8 [m, k], nibbles [m, k / 2] in s4 order, or bf16 / f16 [m, k]; 16-byte aligned rows */
    int64_t a_stride;      /* bytes from row to row, a multiple of 16 */
    const float* a_scale;  /* [m] */
    const int32_t* a_sums; /* [m][k / group], or [m] if group = 0 */
    const void* bias;      /* [n] of bias_type */
    void* out;             /* [m, n] of out_type; QEXP_I32: the exact integer product, nothing else applied */
    int32_t m, n, k;       /* k a multiple of 32 (s8, s4) or 16 (16-bit) */
    int32_t group;         /* 0 or a multiple of 32 that divides k */
    int32_t a_type;        /* QEXP_BF16 or QEXP_F16 for qexp_w4a16 */
    int32_t out_type, bias_type;
};

/* Rotation and quantization of rows x [rows, n]; see qexp/kernels/had_quant.py for the semantics. */
struct QexpRotation {
    const void* x;       /* [rows, n] contiguous, 16-byte aligned, of x_type */
    const int8_t* had_k; /* [order, order] of +-1, null for order 1 */
    void* out;           /* qexp_hadamard: [rows, n] of x_type; qexp_had_quant: codes int8 [rows, n] or nibbles */
    float* scale;        /* [rows, n / group] */
    int32_t* sums;       /* [rows, n / sum_group] */
    int64_t rows;
    int32_t n, width; /* width of a rotated block: order 2^power; 1 for no rotation */
    int32_t order;
    int32_t x_type;
    int32_t bits, packed;     /* 4 or 8; packed: two nibbles a byte */
    int32_t group, sum_group; /* n for whole rows */
    float factor;             /* qexp_hadamard: of the sums; qexp_had_quant: 1 / sqrt(width) or 1 */
    float clip;
};

/* "80,86,89,90a": what this library was built for. */
QEXP_API const char* qexp_cuda_archs(void);
QEXP_API const char* qexp_cuda_error(int code);

/* Canonical nibbles [n, k / 2] to w4_tile, and back (k even; padding is written as zeros). */
QEXP_API int qexp_prepack_w4(const uint8_t* canonical, int32_t n, int32_t k, uint8_t* packed, void* stream);
QEXP_API int qexp_unprepack_w4(const uint8_t* packed, int32_t n, int32_t k, uint8_t* canonical, void* stream);
/* Canonical nibbles [m, k / 2] to s8 [m, k_padded] or to nibbles in s4 order [m, k_padded / 2]; k_padded = k up to 64.
 */
QEXP_API int qexp_expand_a4(const uint8_t* nibbles, int32_t m, int32_t k, int8_t* out, void* stream);
QEXP_API int qexp_reorder_a4(const uint8_t* nibbles, int32_t m, int32_t k, uint8_t* out, void* stream);

/* out [n, k] of out_type = scale q - zero, with the weight's fields of a product (w, scale, inner, zero, n, k, group).
 */
QEXP_API int qexp_dequantize_w4(const struct QexpProduct* product, void* stream);

/* The integer product by one kernel (QEXP_TILE, ...); QEXP_UNSUPPORTED if it does not cover the arguments. */
QEXP_API int qexp_w4a8(const struct QexpProduct* product, int kernel, void* stream);
/* Weights to 16-bit floats, tokens in tiles of 8: for few tokens (m <= 64). */
QEXP_API int qexp_w4a16(const struct QexpProduct* product, void* stream);

QEXP_API int qexp_hadamard(const struct QexpRotation* rotation, void* stream);
QEXP_API int qexp_had_quant(const struct QexpRotation* rotation, void* stream);
