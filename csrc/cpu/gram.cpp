#include "gram.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "float16.h"

namespace qexp {
namespace {

// A word of a panel, from a column's values at one token or two.
struct Wide {
    static constexpr int64_t kTokens = 1;
    static float word(float x, float) { return x; }
    static float word(uint16_t x, uint16_t) { return bf16_to_float(x); }
};

struct Pairs {
    static constexpr int64_t kTokens = 2;
    static float word(uint16_t even, uint16_t odd) {
        const uint32_t bits = even | static_cast<uint32_t>(odd) << 16;
        float word;
        std::memcpy(&word, &bits, sizeof(word));
        return word;
    }
};

// One call: the rows of x, how they are packed, and the sum.
template <typename Element, typename Words>
struct Gram {
    const Element* x;
    int64_t tokens, columns;
    GramTile kernel;
    double* sum;

    int64_t panels() const { return (columns + kGramTile - 1) / kGramTile; }

    void run(ParallelFor loop) const {
        const int64_t all = (tokens + Words::kTokens - 1) / Words::kTokens;
        std::vector<float> packed(static_cast<size_t>(panels() * kGramTile * std::min(all, kGramSteps)));
        for (int64_t start = 0; start < all; start += kGramSteps) {
            const int64_t steps = std::min(kGramSteps, all - start);
            split(loop, panels(), 4, [&](int64_t begin, int64_t end) {
                for (int64_t p = begin; p < end; ++p) {
                    pack(start * Words::kTokens, steps, p * kGramTile, packed.data() + p * steps * kGramTile);
                }
            });
            // A row at a time, the longest first.
            deal(loop, panels(), 1, [&](int64_t row, int64_t) { add_row(packed.data(), steps, row); });
        }
    }

    // The panel of 16 columns from `first` on, with zeros behind the last column and the last token.
    void pack(int64_t token, int64_t steps, int64_t first, float* out) const {
        const Element zeros[kGramTile] = {};
        const int64_t here = std::min(kGramTile, columns - first);
        for (int64_t s = 0; s < steps; ++s, token += Words::kTokens, out += kGramTile) {
            const Element* even = x + token * columns + first;
            const Element* odd = token + 1 < tokens ? even + columns : zeros;
            if (here == kGramTile) {  // a count known in advance makes vectors of it
                for (int64_t c = 0; c < kGramTile; ++c) out[c] = Words::word(even[c], odd[c]);
            } else {
                for (int64_t c = 0; c < here; ++c) out[c] = Words::word(even[c], odd[c]);
                std::fill(out + here, out + kGramTile, 0.0f);
            }
        }
    }

    // The tiles of one row of panels, from the diagonal on, of one chunk.
    void add_row(const float* packed, int64_t steps, int64_t row) const {
        const int64_t size = steps * kGramTile;
        for (int64_t column = row; column < panels(); ++column) {
            float tile[kGramTile * kGramTile] = {};
            kernel(packed + row * size, packed + column * size, steps, tile);
            add_tile(tile, row * kGramTile, column * kGramTile);
        }
    }

    void add_tile(const float* tile, int64_t i, int64_t j) const {
        const int64_t rows = std::min(kGramTile, columns - i), width = std::min(kGramTile, columns - j);
        for (int64_t r = 0; r < rows; ++r) {
            double* out = sum + (i + r) * columns + j;
            for (int64_t c = i == j ? r : 0; c < width; ++c) out[c] += tile[r * kGramTile + c];
        }
    }
};

GramTile tile_kernel() { return QEXP_BY_WIDTH(gram_tile); }

}  // namespace

void add_gram(const void* x, GramInput kind, int64_t tokens, int64_t columns, double* sum, ParallelFor loop) {
    if (kind == GramInput::fp32) {
        Gram<float, Wide>{static_cast<const float*>(x), tokens, columns, tile_kernel(), sum}.run(loop);
        return;
    }
    const uint16_t* halves = static_cast<const uint16_t*>(x);
#if defined(__x86_64__)
    if (use_avx512bf16()) {
        Gram<uint16_t, Pairs>{halves, tokens, columns, gram_tile_avx512bf16, sum}.run(loop);
        return;
    }
#endif
    Gram<uint16_t, Wide>{halves, tokens, columns, tile_kernel(), sum}.run(loop);
}

}  // namespace qexp
