// Chooses the size of a decode kernel: tokens in tiles of 8, two rows of tiles where the matrix has enough of them.
#pragma once

#include "products.cuh"
#include "w4_decode.cuh"

namespace qexp::cuda {

template <class Kernel>
int start_decode(const Product& p, void* stream) {
    const int64_t across = (p.n + Kernel::kFeatures - 1) / Kernel::kFeatures;
    const int64_t down = (p.m + Kernel::kTokens - 1) / Kernel::kTokens;
    return simt::launch<Kernel>(across, down, Kernel::threads, Kernel::kSharedBytes, stream, p);
}

template <class Operand, DecodeScales scales, bool with_zeros = false>
int sized_decode(const Product& p, void* stream) {
    constexpr int kManyRows = 12288;  // from here on 32 features a block still leave several blocks for each SM
    if constexpr (scales == DecodeScales::fine)
        return start_decode<W4Decode<Operand, scales, with_zeros, 2, 2>>(p, stream);
    else if (p.m <= 8 && p.n < kManyRows)
        return start_decode<W4Decode<Operand, scales, with_zeros, 1, 1>>(p, stream);
    else if (p.m <= 8)
        return start_decode<W4Decode<Operand, scales, with_zeros, 2, 1>>(p, stream);
    else if (p.m <= 16)
        return start_decode<W4Decode<Operand, scales, with_zeros, 2, 2>>(p, stream);
    else
        return start_decode<W4Decode<Operand, scales, with_zeros, 2, 4>>(p, stream);
}

template <class Operand>
int scaled_decode_a16(const Product& p, void* stream) {
    const bool zeros = p.zero != nullptr;
    if (p.group == 0 && !zeros) return sized_decode<Operand, DecodeScales::channel>(p, stream);
    if (p.group % 64 == 0) {
        return zeros ? sized_decode<Operand, DecodeScales::group, true>(p, stream)
                     : sized_decode<Operand, DecodeScales::group>(p, stream);
    }
    return zeros ? sized_decode<Operand, DecodeScales::fine, true>(p, stream)
                 : sized_decode<Operand, DecodeScales::fine>(p, stream);
}

}  // namespace qexp::cuda
