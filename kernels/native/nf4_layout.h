// How NF4 weights lie in memory once they are repacked for the CPU, and the constants of the integer product.
//
// A tile is 16 consecutive rows (outputs), padded with zero rows at the end of the matrix. Per tile, in this order:
//   codes   groups x 512 bytes: for every group of 64 inputs, 16 x 64 codes in the order that the ISA's look-up wants
//   scales  groups x 16: int8 (kPackedScales) or float32 (kFloatScales)
//   nested  kPackedScales only: float32 first[16], float32 second[16], int32 border[16]: the nested absmax of a row's
//           groups below its border and from it on. A row of up to 256 groups touches at most two nested groups.
// so that one product of one row of activations reads its weights in one sequential stream.
#pragma once
#include <stdint.h>
#include <string.h>

namespace guanaco {

constexpr int kGroup = 64;  // NF4 group
constexpr int kTileRows = 16;
constexpr int kTileGroupBytes = kTileRows * kGroup / 2;
constexpr int kNestedGroup = 256;
constexpr int kNestedBytes = 3 * kTileRows * 4;

enum ScaleKind : int32_t { kFloatScales = 0, kPackedScales = 1 };

// Order of the codes within a tile's group. Byte order: one byte plane look-up (pshufb) and pairs of bytes; word
// order: one 16-bit look-up (vpermw).
enum Layout : int32_t { kByteOrder = 0, kWordOrder = 1 };

// Levels times this gain, rounded, are the integer weights. Of the gains whose largest level is below 4096 it is the
// one that rounds best: 9.6e-5 relative l2 over normal weights (1.28e-4 for 4095 itself).
constexpr double kLevelGain = 3734.66;
constexpr int kLargestLevel = 3735;
// Activations are integers up to this in each group. 64 products then stay below 2^31, whatever the weights.
constexpr int kLargestActivation = 8983;
static_assert(64LL * kLargestLevel * kLargestActivation < (1LL << 31), "the integer sum of a group must not overflow");

// QLoRA's levels (kernels/nf4.py has the source).
constexpr double kLevels[16] = {
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
};

constexpr int16_t integer_level(int code) {
    double scaled = kLevels[code] * kLevelGain;
    return (int16_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
}

// Packed scales: bitsandbytes' dynamic map without its table. Its 256 entries are symmetric up to the last one (1.0), and
// the i-th of decade e is the middle of a step, 10^(e - 6) * (0.1 + 0.9 * (i + 1/2) / 2^e): linear within the decade,
// and the decade is the exponent of the entry's distance j from the entry for zero (index 127). What is stored is -j,
// which fits an int8, and what is looked up is the decade of x = -4 j: by the low three bits of its exponent field, 1 to
// 7 for decades 0 to 6. Entry 0 serves both x = 0 (value 0) and x = -512 (value 1).
constexpr double ten_to_minus(int e) { return e == 0 ? 1.0 : ten_to_minus(e - 1) / 10.0; }
constexpr float map_base(int e) { return float(-ten_to_minus(6 - e) * (-0.8 + 0.45 / (1 << e))); }
constexpr float map_slope(int e) { return float(-ten_to_minus(6 - e) * 0.9 / (4 << e)); }
constexpr float kMapBase[8] = {0.0f,        map_base(0), map_base(1), map_base(2),
                               map_base(3), map_base(4), map_base(5), map_base(6)};
constexpr float kMapSlope[8] = {-1.0f / 512,  map_slope(0), map_slope(1), map_slope(2),
                                map_slope(3), map_slope(4), map_slope(5), map_slope(6)};

// The map's entry for a stored -j. Every ISA computes it with these roundings.
inline float dynamic_value(int8_t stored) {
    float x = float(stored * 4);
    uint32_t bits;
    memcpy(&bits, &x, 4);
    int decade = (bits >> 23) & 7;
    float slope = x * kMapSlope[decade];
    return slope + (x < 0 ? -kMapBase[decade] : kMapBase[decade]);
}

inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

inline int64_t tile_bytes(int64_t groups, int32_t scale_kind) {
    int64_t scales = scale_kind == kPackedScales ? groups * kTileRows + kNestedBytes : groups * kTileRows * 4;
    return (groups * kTileGroupBytes + scales + 63) / 64 * 64;
}

// Index into a tile group's 512 bytes, and whether it is the high nibble, of the code of row r (0..15), input k (0..63).
struct CodePlace {
    int byte;
    bool high;
};

inline CodePlace code_place(int32_t layout, int r, int k) {
    if (layout == kByteOrder) {
        // 32 bytes hold four inputs: the low nibbles two, the high ones two. Each 128-bit lane interleaves to rows
        // 0-3 (or 4-7) from its lower half and 8-11 (or 12-15) from its upper one.
        int chunk = k / 4, lane = (r / 4) & 1, half = r / 8;
        return {chunk * 32 + lane * 16 + half * 8 + (r & 3) * 2 + (k & 1), (k & 2) != 0};
    }
    // 64 bytes hold eight inputs: nibble j of 16-bit word 2 r + p is input 2 j + p.
    int chunk = k / 8, j = (k % 8) / 2, word = 2 * r + (k & 1);
    return {chunk * 64 + word * 2 + j / 2, (j & 1) != 0};
}

}  // namespace guanaco
