// Few tokens, fp16 activations.
#include "decode_start.cuh"

int qexp::cuda::run_decode_half(const Product& p, void* stream) {
    return scaled_decode_a16<Operand16<QEXP_F16>>(p, stream);
}
