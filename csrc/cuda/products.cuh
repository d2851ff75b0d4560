// What the files of this folder offer one another; the C ABI of qexp_cuda.h is put together in qexp_cuda.cu.
#pragma once

#include "qexp_cuda.h"

namespace qexp::cuda {

int run_tile(const QexpProduct& product, void* stream);
int run_tile_s4(const QexpProduct& product, void* stream);
int run_decode(const QexpProduct& product, void* stream);
int run_decode_bf16(const QexpProduct& product, void* stream);
int run_decode_half(const QexpProduct& product, void* stream);
int run_wgmma(const QexpProduct& product, void* stream);
int run_rotation(const QexpRotation& rotation, bool quantize, void* stream);

}  // namespace qexp::cuda
