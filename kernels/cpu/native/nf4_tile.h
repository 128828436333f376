// Products of one tile of NF4 weights with quantised activations, on top of an ISA's core (nf4_avx2.h and its like).
// A row's result has the same bits with any number of other rows and on any ISA: sums within a group are integers, and
// float sums over groups have one order and the same roundings.
#pragma once
#include "nf4_layout.h"
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

// Each isa_*.cpp sets kFewRows, kDirectRows, kMaxRows and kSideBySideRows. Up to kFewRows rows of activations are
// multiplied while a group is decoded. With more rows, only the first kDirectRows are; the others are multiplied with
// the decoded levels, at most kMaxRows at a time. Up to kSideBySideRows rows are multiplied with several tiles at once.

// Prefetch codes kPrefetchBytes ahead. The next tile follows in memory, so this is useful at the end of a tile, too.
inline void prefetch_group(const uint8_t* codes) {
    for (int i = 0; i < kTileGroupBytes; i += 64) __builtin_prefetch(codes + i, 0, 3);
}

// x: int16 [groups][stride][64], factors: float32 [groups][stride], both at the first of `rows` rows; y: [rows][16].
template <int M>
void multiply_few(const uint8_t* tile, int64_t groups, const int16_t* x, const float* factors, int64_t stride,
                  float* y) {
    const int16_t* scales = (const int16_t*)(tile + groups * kTileGroupBytes);
    const Decoder decode;
    F16 total[M];
    for (int m = 0; m < M; m++) total[m] = zero16();
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t* codes = tile + g * kTileGroupBytes;
        prefetch_group(codes + kPrefetchBytes);
        I16 products[M];
        dot_codes<M>(decode, codes, x + g * stride * kGroup, products);
        F16 scale = load_scales(scales + g * kTileRows);
        for (int m = 0; m < M; m++) total[m] = accumulate(total[m], products[m], scale, factors[g * stride + m]);
    }
    F16 row_factor = load16((const float*)(scales + groups * kTileRows));
    for (int m = 0; m < M; m++) store16(y + m * kTileRows, multiply(total[m], row_factor));
}

// The same for T neighbouring tiles at once; y: [T][M][16].
template <int T, int M>
void multiply_tiles(const uint8_t* tile, int64_t groups, const int16_t* x, const float* factors, int64_t stride,
                    float* y) {
    const int64_t bytes = tile_bytes(groups);
    const uint8_t* scales = tile + groups * kTileGroupBytes;
    const Decoder decode;
    F16 total[T * M];
    for (int i = 0; i < T * M; i++) total[i] = zero16();
    for (int64_t g = 0; g < groups; g++, scales += kTileGroupScaleBytes) {
        I16 products[T * M];
        dot_tiles<T, M>(decode, tile + g * kTileGroupBytes, bytes, x + g * stride * kGroup, products);
        for (int t = 0; t < T; t++) {
            F16 scale = load_scales((const int16_t*)(scales + t * bytes));
            for (int m = 0; m < M; m++) {
                total[t * M + m] = accumulate(total[t * M + m], products[t * M + m], scale, factors[g * stride + m]);
            }
        }
    }
    for (int t = 0; t < T; t++) {
        F16 row_factor = load16((const float*)(scales + t * bytes));
        for (int m = 0; m < M; m++) store16(y + (t * M + m) * kTileRows, multiply(total[t * M + m], row_factor));
    }
}

// y += products of M rows with one group.
template <int M>
inline void take(const I16* products, const float* factors, F16 scale, float* y) {
    for (int m = 0; m < M; m++) {
        store16(y + m * kTileRows, accumulate(load16(y + m * kTileRows), products[m], scale, factors[m]));
    }
}

template <int M>
inline void step(const int16_t* levels, const int16_t* x, const float* factors, F16 scale, float* y) {
    I16 products[M];
    dot_levels<M>(levels, x, products);
    take<M>(products, factors, scale, y);
}

// step<height>, for a height of 1 … M.
template <int M>
inline void step_of(int64_t height, const int16_t* levels, const int16_t* x, const float* factors, F16 scale, float* y) {
    if constexpr (M > 1) {
        if (height < M) return step_of<M - 1>(height, levels, x, factors, scale, y);
    }
    step<M>(levels, x, factors, scale, y);
}

// For more than kDirectRows rows: the first kDirectRows are multiplied while a group is decoded, the others afterwards.
void multiply_many(const uint8_t* tile, int64_t groups, const int16_t* x, const float* factors, int64_t stride,
                   int64_t rows, float* y) {
    const int16_t* scales = (const int16_t*)(tile + groups * kTileGroupBytes);
    const Decoder decode;
    alignas(64) int16_t levels[kTileRows * kGroup];
    for (int64_t m = 0; m < rows; m++) store16(y + m * kTileRows, zero16());
    // Blocks of nearly equal height: seven rows are four and three rather than six and one.
    int64_t blocks = (rows - kDirectRows + kMaxRows - 1) / kMaxRows;
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t* codes = tile + g * kTileGroupBytes;
        prefetch_group(codes + kPrefetchBytes);
        F16 scale = load_scales(scales + g * kTileRows);
        const int16_t* xg = x + g * stride * kGroup;
        const float* fg = factors + g * stride;
        I16 products[kDirectRows];
        dot_and_decode<kDirectRows>(decode, codes, xg, levels, products);
        take<kDirectRows>(products, fg, scale, y);
        for (int64_t b = 0, m = kDirectRows; b < blocks; b++) {
            int64_t height = (rows - m + blocks - b - 1) / (blocks - b);
            step_of<kMaxRows>(height, levels, xg + m * kGroup, fg + m, scale, y + m * kTileRows);
            m += height;
        }
    }
    F16 row_factor = load16((const float*)(scales + groups * kTileRows));
    for (int64_t m = 0; m < rows; m++) {
        store16(y + m * kTileRows, multiply(load16(y + m * kTileRows), row_factor));
    }
}

// multiply_few<rows>, for 1 … M rows.
template <int M>
void multiply_up_to(const uint8_t* tile, int64_t groups, const int16_t* x, const float* factors, int64_t stride,
                    int64_t rows, float* y) {
    if constexpr (M > 1) {
        if (rows < M) return multiply_up_to<M - 1>(tile, groups, x, factors, stride, rows, y);
    }
    multiply_few<M>(tile, groups, x, factors, stride, y);
}

void nf4_tile(const uint8_t* tile, int64_t groups, const int16_t* x, const float* factors, int64_t stride,
              int64_t rows, float* y) {
    static_assert(kDirectRows <= kFewRows, "multiply_many() has rows beyond the direct ones");
    if (rows > kFewRows) return multiply_many(tile, groups, x, factors, stride, rows, y);
    multiply_up_to<kFewRows>(tile, groups, x, factors, stride, rows, y);
}

// T neighbouring tiles, or as many of them as `count` allows; returns their number.
template <int T, int M>
int64_t multiply_some(const uint8_t* tile, int64_t count, int64_t groups, const int16_t* x, const float* factors,
                      int64_t stride, float* y) {
    if constexpr (T > 1) {
        if (count < T) return multiply_some<T / 2, M>(tile, count, groups, x, factors, stride, y);
        multiply_tiles<T, M>(tile, groups, x, factors, stride, y);
    } else {
        multiply_few<M>(tile, groups, x, factors, stride, y);
    }
    return T;
}

// `count` neighbouring tiles; y: [count][rows][16]. Few rows wait for memory, and it is faster if several tiles are read
// side by side. For more rows than the ISA's kSideBySideRows the multiplications take longer than memory does.
void nf4_tiles(const uint8_t* tile, int64_t count, int64_t groups, const int16_t* x, const float* factors,
               int64_t stride, int64_t rows, float* y) {
    static_assert(kSideBySideRows <= 5, "every number of rows up to it needs a case");
    constexpr int kAll = kTilesAtOnce, kHalf = kAll > 1 ? kAll / 2 : 1;
    int64_t taken = 1;
    for (; count > 0; count -= taken, tile += taken * tile_bytes(groups), y += taken * rows * kTileRows) {
        switch (rows <= kSideBySideRows ? rows : 0) {
            case 1: taken = multiply_some<kAll, 1>(tile, count, groups, x, factors, stride, y); break;
            case 2: taken = multiply_some<kHalf, 2>(tile, count, groups, x, factors, stride, y); break;
            case 3: taken = multiply_some<kHalf, 3>(tile, count, groups, x, factors, stride, y); break;
            case 4: taken = multiply_some<kHalf, 4>(tile, count, groups, x, factors, stride, y); break;
            case 5: taken = multiply_some<kHalf, 5>(tile, count, groups, x, factors, stride, y); break;
            default: nf4_tile(tile, groups, x, factors, stride, rows, y);
        }
    }
}

// A tile's rows as numbers: level · (integer scale · row factor), each product rounded to float32. This is the weight
// that the integer products approximate.
void decode_tile(const uint8_t* tile, int64_t groups, int64_t first, int64_t rows, float* out, int64_t stride) {
    const int16_t* scales = (const int16_t*)(tile + groups * kTileGroupBytes);
    const F16 row_factor = load16((const float*)(scales + groups * kTileRows));
    for (int64_t g = 0; g < groups; g++) {
        F16 factors = multiply(load_scales(scales + g * kTileRows), row_factor);
        decode_group_rows(tile + g * kTileGroupBytes, factors, first, rows, out + g * kGroup, stride);
    }
}

// Activations of one row as integers, with one factor per group: x = integer * factor. The factor is also divided by
// the gain of the levels. In both outputs, groups are `stride` rows apart. NaN and infinity make the factor not finite,
// so they are not lost.
void quantize_row(const float* x, int64_t groups, int64_t stride, int16_t* integers, float* factors) {
    for (int64_t g = 0; g < groups; g++) {
        const float* xg = x + g * kGroup;
        vi largest = {};
        for (int i = 0; i < kGroup; i += W) {
            vi bits = (vi)load(xg + i) & 0x7fffffff;  // magnitudes order like their bits, NaN above all
            largest = bits > largest ? bits : largest;
        }
        int32_t top = max_of(largest);
        float absmax;
        memcpy(&absmax, &top, 4);
        // Below 1e-30 the reciprocal could overflow; such a group counts as zero.
        float to_integer = absmax < 1e-30f ? 0.0f : float(kLargestActivation) / absmax;
        int16_t* out = integers + g * stride * kGroup;
        for (int i = 0; i < kGroup; i += W) {
            vf scaled = round_to_int(load(xg + i) * splat(to_integer));
#if defined(GUANACO_HAS_AVX2)
            __m256i q = _mm256_cvtps_epi32((__m256)scaled);
            __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(q, q), 0x08);
            _mm_storeu_si128((__m128i*)(out + i), _mm256_castsi256_si128(packed));
#else
            for (int j = 0; j < W; j++) out[i + j] = int16_t(int32_t(scaled[j]));
#endif
        }
        factors[g * stride] = absmax < 1e-30f ? 0.0f : absmax * float(1.0 / kLargestActivation / kLevelGain);
    }
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
