#include "gram.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "float16.h"

namespace qexp {
namespace {

GramTile tile_kernel() { return by_width<GramTile>(gram_tile_scalar, gram_tile_avx2, gram_tile_avx512bw); }

float value_of(float x) { return x; }

float value_of(uint16_t bf16) { return bf16_to_float(bf16); }

// Panels begin..end of `tokens` rows of x, with zeros behind the last column.
template <typename Element>
void pack(const Element* x, int64_t tokens, int64_t columns, int64_t begin, int64_t end, float* panels) {
    for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kGramTile, here = std::min(kGramTile, columns - first);
        float* out = panels + p * tokens * kGramTile;
        for (int64_t t = 0; t < tokens; ++t, out += kGramTile) {
            const Element* in = x + t * columns + first;
            for (int64_t c = 0; c < here; ++c) out[c] = value_of(in[c]);
            std::fill(out + here, out + kGramTile, 0.0f);
        }
    }
}

// Adds one tile of a chunk to out, if the tile has places there.
void add_tile(const float* tile, int64_t columns, int64_t i, int64_t j, float* out) {
    const int64_t rows = std::min(kGramTile, columns - i), width = std::min(kGramTile, columns - j);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width; ++c) out[(i + r) * columns + j + c] += tile[r * kGramTile + c];
    }
}

// The tiles of one row of panels, from the diagonal on, of one chunk.
void add_row(GramTile kernel, const float* panels, int64_t count, int64_t tokens, int64_t columns, int64_t row,
             float* out) {
    const int64_t size = tokens * kGramTile;
    for (int64_t column = row; column < count; ++column) {
        float tile[kGramTile * kGramTile] = {};
        kernel(panels + row * size, panels + column * size, tokens, tile);
        add_tile(tile, columns, row * kGramTile, column * kGramTile, out);
    }
}

}  // namespace

void gram(const void* x, GramInput kind, int64_t tokens, int64_t columns, float* out, ParallelFor loop) {
    const GramTile kernel = tile_kernel();
    const int64_t panels = (columns + kGramTile - 1) / kGramTile;
    std::vector<float> packed(static_cast<size_t>(panels * kGramTile * std::min(tokens, kGramChunk)));
    std::fill(out, out + columns * columns, 0.0f);
    for (int64_t start = 0; start < tokens; start += kGramChunk) {
        const int64_t here = std::min(kGramChunk, tokens - start);
        split(loop, panels, 4, [&](int64_t begin, int64_t end) {
            if (kind == GramInput::fp32) {
                pack(static_cast<const float*>(x) + start * columns, here, columns, begin, end, packed.data());
            } else {
                pack(static_cast<const uint16_t*>(x) + start * columns, here, columns, begin, end, packed.data());
            }
        });
        // Row r and its mirror image share a task: together they have as many tiles as any other pair.
        split(loop, (panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                add_row(kernel, packed.data(), panels, here, columns, row, out);
                const int64_t mirror = panels - 1 - row;
                if (mirror != row) add_row(kernel, packed.data(), panels, here, columns, mirror, out);
            }
        });
    }
    split(loop, columns, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t j = 0; j < i; ++j) out[i * columns + j] = out[j * columns + i];
        }
    });
}

}  // namespace qexp
