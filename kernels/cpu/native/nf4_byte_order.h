// Decodes a group of a tile to float32, for ISAs with codes in byte order. Included after the ISA's F16.
#pragma once
#include "nf4_layout.h"
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

// A group's weights, level · factor of the row: rows first … first + rows − 1, `stride` apart, 64 inputs of each.
inline void decode_group_rows(const uint8_t* codes, F16 factors, int64_t first, int64_t rows, float* out, int64_t stride) {
    float factor[kTileRows];
    store16(factor, factors);
    for (int64_t r = 0; r < rows; r++, out += stride) {
        int row = int(first + r);
        const uint8_t* from = codes + (row / 4 % 2) * 16 + row / 8 * 8 + row % 4 * 2;
        float levels[16];  // of this row and group
        for (int i = 0; i < 16; i += W) store(levels + i, load(kFloatLevels + i) * splat(factor[row]));
        for (int chunk = 0; chunk < kGroup / 4; chunk++, from += 32) {
            float* to = out + 4 * chunk;
            to[0] = levels[from[0] & 15];
            to[1] = levels[from[1] & 15];
            to[2] = levels[from[0] >> 4];
            to[3] = levels[from[1] >> 4];
        }
    }
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
