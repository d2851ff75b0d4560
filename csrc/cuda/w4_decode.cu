// Few tokens, int8 activations.
#include "decode_start.cuh"

int qexp::cuda::run_decode(const Product& p, void* stream) {
    if (p.out_type == QEXP_I32 || p.group == 0) return sized_decode<OperandS8, DecodeScales::channel>(p, stream);
    if (p.group % 64 == 0) return sized_decode<OperandS8, DecodeScales::group>(p, stream);
    return sized_decode<OperandS8, DecodeScales::fine>(p, stream);
}
