// Few tokens, bf16 activations.
#include "decode_start.cuh"

int qexp::cuda::run_decode_bf16(const Product& p, void* stream) {
    return scaled_decode_a16<Operand16<QEXP_BF16>>(p, stream);
}
