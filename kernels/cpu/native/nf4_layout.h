// The memory layout of NF4 weights that were repacked for the CPU, and the constants of the integer product.
//
// A tile is 16 consecutive rows (outputs), padded with zero rows at the end of the matrix. Per tile, in this order:
//   codes    groups x 512 bytes: for every group of 64 inputs, 16 x 64 codes in the order that the ISA's look-up wants
//   scales   groups x 16 x int16, in units of the row's own factor
//   factors  16 x float32: largest scale of the row / 32767
// So the product with one row of activations reads its weights in one sequential stream.
//
// Checkpoints store scales as 8-bit codes (double quantisation) or as float32; int16 replaces both. It takes 3 % more
// bytes than the codes and adds an error of 1e-5; decoding the codes in the product took a sixth of its time.
#pragma once
#include <stdint.h>

namespace guanaco {

constexpr int kGroup = 64;  // NF4 group
constexpr int kTileRows = 16;
constexpr int kTileGroupBytes = kTileRows * kGroup / 2;
constexpr int kTileGroupScaleBytes = kTileRows * 2;
constexpr int kLargestScale = 32767;

// Order of the codes within a tile's group. Byte order: one byte plane look-up (pshufb) and pairs of bytes; word
// order: one 16-bit look-up (vpermw).
enum Layout : int32_t { kByteOrder = 0, kWordOrder = 1 };

// The integer weights are the levels times this gain, rounded. Among gains with a largest integer below 4096, this one
// has the smallest rounding error: 9.6e-5 relative l2 over normal weights (1.28e-4 for a gain of 4095).
constexpr double kLevelGain = 3734.66;
constexpr int kLargestLevel = 3735;
// The largest integer activation of a group. With it, the sum of 64 products stays below 2^31 for any weights.
constexpr int kLargestActivation = 8983;
static_assert(64LL * kLargestLevel * kLargestActivation < (1LL << 31), "the integer sum of a group must not overflow");

// QLoRA's levels (kernels/nf4.py has the source).
constexpr double kLevels[16] = {
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
};

constexpr float kFloatLevels[16] = {
    float(kLevels[0]),  float(kLevels[1]),  float(kLevels[2]),  float(kLevels[3]),  float(kLevels[4]),  float(kLevels[5]),
    float(kLevels[6]),  float(kLevels[7]),  float(kLevels[8]),  float(kLevels[9]),  float(kLevels[10]), float(kLevels[11]),
    float(kLevels[12]), float(kLevels[13]), float(kLevels[14]), float(kLevels[15]),
};

constexpr int16_t integer_level(int code) {
    double scaled = kLevels[code] * kLevelGain;
    return (int16_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
}

inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Bytes of one tile, whole cache lines.
inline int64_t tile_bytes(int64_t groups) {
    return (groups * (kTileGroupBytes + kTileGroupScaleBytes) + kTileRows * 4 + 63) / 64 * 64;
}

// Index into a tile group's 512 bytes, and whether it is the high nibble, of the code of row r (0..15), input k
// (0..63).
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
