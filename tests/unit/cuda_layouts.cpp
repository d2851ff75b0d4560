// Proves the maps of csrc/cuda/layout.h and the bit tricks of numbers.cuh over all their inputs; prints what fails.
#include <cmath>
#include <cstdio>
#include <set>

#include "numbers.cuh"

using namespace qexp;
using namespace qexp::cuda;

static int failures = 0;

static void check(bool good, const char* what) {
    if (!good) std::printf("%s\n", what), ++failures;
}

// The inverse holds at compile time, which is what makes the kernels' use of these functions free.
static_assert(cell_of({5, 7, 1}).row == nibble_of(cell_of({5, 7, 1})).lane / 4 + 8);

static void tiles() {
    std::set<int> seen;
    for (int lane = 0; lane < 32; ++lane)
        for (int byte = 0; byte < 16; ++byte)
            for (int high = 0; high < 2; ++high) {
                const Cell cell = cell_of({lane, byte, high});
                const Nibble back = nibble_of(cell);
                check(back.lane == lane && back.byte == byte && back.high == high,
                      "nibble_of is not the inverse of cell_of");
                check(cell.row >= 0 && cell.row < kTileRows && cell.column >= 0 && cell.column < kTileColumns,
                      "cell outside");
                seen.insert(cell.row * kTileColumns + cell.column);
            }
    check(seen.size() == static_cast<size_t>(kTileRows * kTileColumns), "cell_of is not onto");
    std::set<int> columns;
    for (int i = 0; i < 64; ++i) columns.insert(s4_column(i));
    check(columns.size() == 64 && *columns.begin() == 0 && *columns.rbegin() == 63, "s4_column is no permutation");
}

// What the kernels read from a tile without moving a byte is what the instructions take.
static void operands() {
    for (int lane = 0; lane < 32; ++lane)
        for (int step = 0; step < 2; ++step)
            for (int reg = 0; reg < 4; ++reg)
                for (int i = 0; i < 4; ++i) {
                    const Cell held = cell_of({lane, 4 * (2 * step + (reg & 1)) + i, reg >> 1}),
                               wanted = a_cell(8, lane, reg, i);
                    check(held.row == wanted.row && held.column == 32 * step + wanted.column, "s8 operand");
                }
    // Native s4: the raw words are the operand if activations are in the order of s4_column.
    for (int lane = 0; lane < 32; ++lane)
        for (int word = 0; word < 4; ++word)
            for (int i = 0; i < 8; ++i) {
                const Cell held = cell_of({lane, 4 * word + i / 2, i % 2}), wanted = a_cell(4, lane, word, i);
                const int position = 8 * (2 * (lane % 4) + word / 2) + i;
                check(held.row == wanted.row && held.column == s4_column(position), "s4 operand");
                check(b_cell(4, lane, word / 2, i).row == wanted.column, "s4 operands disagree on the inputs");
            }
}

template <class Map>
static void permutes(Map map, int count, const char* what) {
    std::set<int> seen;
    for (int i = 0; i < count; ++i) seen.insert(map(i));
    check(seen.size() == static_cast<size_t>(count) && *seen.begin() == 0 && *seen.rbegin() == count - 1, what);
}

// Lanes of one phase of a shared-memory access must use different banks: width 4, 8 or 16 bytes, 128 bytes a phase.
template <class Address>
static int conflicts(Address address, int width) {
    int worst = 1;
    for (int phase = 0; phase < 32; phase += 128 / width) {
        int uses[32] = {};
        for (int lane = phase; lane < phase + 128 / width && lane < 32; ++lane)
            for (int word = 0; word < width / 4; ++word) ++uses[(address(lane) / 4 + word) % 32];
        for (int bank : uses) worst = bank > worst ? bank : worst;
    }
    return worst;
}

static void shared_memory() {
    permutes([](int i) { return chunk_in_64(i / 64, i % 64 / 16) + i % 16; }, 64 * 64, "chunk_in_64 is no permutation");
    permutes([](int i) { return chunk_in_128(i / 128, i % 128 / 16) + i % 16; }, 64 * 128,
             "chunk_in_128 is no permutation");
    permutes(scattered, 8192, "scattered is no permutation");
    for (int row = 0; row < 8; ++row)
        for (int other = 0; other < row; ++other)
            check(chunk_in_64(row, 2) / 16 % 8 != chunk_in_64(other, 2) / 16 % 8, "two rows of a ldmatrix share banks");
    for (int i = 0; i < 32; i += 4)
        check(conflicts([&](int lane) { return 4 * scattered(32 * lane + i); }, 16) == 1,
              "32 neighbours a lane: conflict");
    for (int lo : {4, 5, 6, 8, 9})
        for (int s = 0; s < 16; ++s) {
            const auto pair = [&](int lane) {
                return 4 * scattered((lane >> (lo - 1)) << (lo + 4) | (lane & ((1 << (lo - 1)) - 1)) << 1 | s << lo);
            };
            check(conflicts(pair, 8) == 1, "pairs of columns: conflict");
        }
}

static int byte_of(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }
static int nibble(uint32_t word, int i) { return static_cast<int>(word << (28 - 4 * i)) >> 28; }

static void tricks() {
    for (uint32_t x = 0; x < 65536; ++x) {
        const uint32_t word = x << 16 | (x * 40503u & 0xFFFFu);
        const uint32_t bf16 = to_bf16x2(word), half = to_half2(word);
        for (int i = 0; i < 4; ++i) {
            check(byte_of(times16_low(word), i) == 16 * nibble(word, 2 * i), "times16_low");
            check(byte_of(times16_high(word), i) == 16 * nibble(word, 2 * i + 1), "times16_high");
        }
        for (int i = 0; i < 2; ++i) {
            check(simt::from_bf16(bf16 >> (16 * i) & 0xFFFFu) == static_cast<float>(nibble(word, 4 * i)), "to_bf16x2");
            check(simt::from_half(half >> (16 * i) & 0xFFFFu) == static_cast<float>(nibble(word, 4 * i)), "to_half2");
        }
        for (uint32_t scale = 1; scale <= 15; ++scale)
            for (int i = 0; i < 4; ++i)
                check(byte_of(times_scale(word, scale), i) == static_cast<int>(scale) * nibble(word, 2 * i),
                      "times_scale");
    }
    for (int sum = -(1 << 22) + 1; sum < 1 << 22; sum += 7)
        check(from_magic(kMagicBits + sum) == static_cast<float>(sum), "from_magic");
    for (int i = -2600; i <= 2600; ++i) {
        const float value = static_cast<float>(i) / 10.0f;
        check(static_cast<int>(to_magic(value)) - kMagicBits == static_cast<int>(std::nearbyint(value)), "to_magic");
    }
}

int main() {
    tiles();
    operands();
    shared_memory();
    tricks();
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
