#include "repack.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>

namespace guanaco {
namespace {

// Two codes of the level 0: rows of a tile beyond the matrix have these.
constexpr uint8_t kZeroPair = 0x77;

// In bitsandbytes' codes the even input of a pair is the high nibble. Both orders are made from whole words of these.

// Four inputs of one row: nibbles 1 0 3 2 → two bytes of the byte order, nibbles 0 2 1 3 (`code_place`).
inline uint16_t in_byte_order(uint16_t s) {
    return uint16_t((s >> 4 & 0x000f) | (s >> 8 & 0x00f0) | (s << 8 & 0x0f00) | (s << 4 & 0xf000));
}

// Eight inputs of one row: nibbles 1 0 3 2 5 4 7 6 → the word of the even ones, then that of the odd ones.
inline uint32_t in_word_order(uint32_t s) {
    uint32_t even = s >> 4 & 0x0f0f0f0f, odd = s & 0x0f0f0f0f;
    even = (even | even >> 4) & 0x00ff00ff;
    odd = (odd | odd >> 4) & 0x00ff00ff;
    return ((even | even >> 8) & 0xffff) | (odd | odd >> 8) << 16;
}

// One group of each of the tile's rows. Little-endian, as all of this library.
void repack_codes(int32_t layout, const uint8_t* const* rows, uint8_t* out) {
    for (int r = 0; r < kTileRows; r++) {
        if (layout == kByteOrder) {
            uint16_t words[kGroup / 4];
            memcpy(words, rows[r], sizeof(words));
            for (uint16_t& word : words) word = in_byte_order(word);
            uint8_t* to = out + code_place(layout, r, 0).byte;
            for (int i = 0; i < kGroup / 4; i++) memcpy(to + i * 32, words + i, 2);
        } else {
            uint32_t words[kGroup / 8];
            memcpy(words, rows[r], sizeof(words));
            for (uint32_t& word : words) word = in_word_order(word);
            uint8_t* to = out + code_place(layout, r, 0).byte;
            for (int i = 0; i < kGroup / 8; i++) memcpy(to + i * 64, words + i, 4);
        }
    }
}

void repack_tile(int32_t layout, const uint8_t* packed, const float* scales, int64_t n, int64_t k, int64_t tile,
                 uint8_t* out) {
    int64_t groups = k / kGroup, first = tile * kTileRows;
    uint8_t zeros[kGroup / 2];
    memset(zeros, kZeroPair, sizeof(zeros));
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t* rows[kTileRows];
        for (int r = 0; r < kTileRows; r++) {
            rows[r] = first + r < n ? packed + (first + r) * k / 2 + g * (kGroup / 2) : zeros;
        }
        repack_codes(layout, rows, out + g * kTileGroupBytes);
    }

    int16_t* integers = (int16_t*)(out + groups * kTileGroupBytes);
    float* factors = (float*)(integers + groups * kTileRows);
    for (int r = 0; r < kTileRows; r++) {
        const float* row = scales + (first + r) * groups;
        float largest = 0.0f;
        for (int64_t g = 0; g < groups && first + r < n; g++) largest = std::max(largest, fabsf(row[g]));
        float to_integer = largest < 1e-30f ? 0.0f : kLargestScale / largest;
        for (int64_t g = 0; g < groups; g++) {
            integers[g * kTileRows + r] = first + r < n ? int16_t(lrintf(row[g] * to_integer)) : int16_t(0);
        }
        factors[r] = largest / kLargestScale;
    }
}

}  // namespace

void repack_nf4(Context& context, const uint8_t* packed, const float* scales, int64_t n, int64_t k, uint8_t* out) {
    int64_t bytes = tile_bytes(k / kGroup);
    int32_t layout = context.kernels->layout;
    context.pool.each(tiles_of(n), [&](int64_t tile, int) {
        memset(out + (tile + 1) * bytes - 64, 0, 64);  // the padding: equal weights give equal files
        repack_tile(layout, packed, scales, n, k, tile, out + tile * bytes);
    });
}

bool quantize_nf4(Context& context, const void* x, int32_t dtype, int64_t groups, uint8_t* packed, float* scales) {
    const int64_t chunk = 1024;  // 64 k values: a few ten microseconds of work a task
    std::atomic<bool> finite{true};
    context.pool.each((groups + chunk - 1) / chunk, [&](int64_t i, int) {
        int64_t count = std::min(chunk, groups - i * chunk);
        if (!context.kernels->encode_groups(x, dtype, i * chunk, count, packed, scales)) finite = false;
    });
    return finite;
}

void decode_rows(Context& context, const Linear& weight, int64_t first, int64_t count, void* out, int32_t dtype) {
    const Kernels& k = *context.kernels;
    const int64_t columns = weight.k, groups = columns / kGroup, tile0 = first / kTileRows;
    const int64_t tiles = count <= 0 ? 0 : (first + count - 1) / kTileRows - tile0 + 1;
    const bool rounds = dtype != kFloat32;
    Context::PerThread rounded = context.per_thread(rounds ? kTileRows * columns : 0);
    context.pool.each(tiles, [&](int64_t i, int thread) {
        int64_t begin = std::max(first, (tile0 + i) * kTileRows);
        int64_t end = std::min(first + count, (tile0 + i + 1) * kTileRows), rows = end - begin;
        float* to = rounds ? rounded.of(thread) : (float*)out + (begin - first) * columns;
        switch (weight.kind) {
            case kNf4Tiled:
                k.decode_tile(weight.data + (tile0 + i) * tile_bytes(groups), groups, begin % kTileRows, rows, to, columns);
                break;
            case kNf4Flat: k.decode_flat(weight.data, weight.scales, begin * columns, rows * columns, to); break;
            default: {
                int64_t element = weight.dtype == kFloat32 ? 4 : 2;
                k.to_float(weight.data + begin * columns * element, weight.dtype, rows * columns, to);
            }
        }
        if (rounds) k.from_float(to, rows * columns, (uint16_t*)out + (begin - first) * columns, dtype);
    });
}

}  // namespace guanaco
