#include "repack.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>

namespace guanaco {
namespace {

// Two codes of weight 0.0, with which rows beyond the matrix are filled.
constexpr uint8_t kZeroPair = 0x77;

void repack_codes(int32_t layout, const uint8_t* const* rows, int64_t group, uint8_t* out) {
    uint8_t codes[kTileRows][kGroup];
    for (int r = 0; r < kTileRows; r++) {
        for (int i = 0; i < kGroup / 2; i++) {
            uint8_t byte = rows[r] == nullptr ? kZeroPair : rows[r][group * (kGroup / 2) + i];
            codes[r][2 * i] = byte >> 4;
            codes[r][2 * i + 1] = byte & 15;
        }
    }
    memset(out, 0, kTileGroupBytes);
    for (int r = 0; r < kTileRows; r++) {
        for (int k = 0; k < kGroup; k++) {
            CodePlace place = code_place(layout, r, k);
            out[place.byte] |= uint8_t(place.high ? codes[r][k] << 4 : codes[r][k]);
        }
    }
}

void repack_tile(int32_t layout, const uint8_t* packed, const float* scales, int64_t n, int64_t k, int64_t tile,
                 uint8_t* out) {
    int64_t groups = k / kGroup, first = tile * kTileRows;
    const uint8_t* rows[kTileRows];
    for (int r = 0; r < kTileRows; r++) rows[r] = first + r < n ? packed + (first + r) * k / 2 : nullptr;
    for (int64_t g = 0; g < groups; g++) repack_codes(layout, rows, g, out + g * kTileGroupBytes);

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
