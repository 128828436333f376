// Products of one tile of NF4 weights with quantised activations, on top of an ISA's core (nf4_avx2.h and its like).
// The same numbers for one row as for many, on any ISA: integer sums within a group, and float sums over groups in one
// order with the same roundings.
#pragma once
#include "nf4_layout.h"
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

template <int32_t S>
struct ScaleReader;
template <>
struct ScaleReader<kFloatScales> {
    ScaleReader(const uint8_t*, int64_t, float) {}
    F16 operator()(const uint8_t* scales, int group) const { return load16((const float*)scales + kTileRows * group); }
};
template <>
struct ScaleReader<kPackedScales> {
    PackedScales packed;
    ScaleReader(const uint8_t* scales, int64_t groups, float offset) : packed(scales + groups * kTileRows, offset) {}
    F16 operator()(const uint8_t* scales, int group) const { return packed(scales + kTileRows * group, group); }
};

// x: int16 [groups][stride][64], factors: float32 [groups][stride], both at the first of `rows` rows; y: [rows][16].
template <int32_t S>
void multiply_one(const uint8_t* tile, int64_t groups, float offset, const int16_t* x, const float* factors,
                  int64_t stride, float* y) {
    const uint8_t* scales = tile + groups * kTileGroupBytes;
    const ScaleReader<S> scale_of(scales, groups, offset);
    const Decoder decode;
    F16 total = zero16();
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t* codes = tile + g * kTileGroupBytes;
        // A group is eight cache lines; the next tile follows this one, so running ahead is never in vain.
        for (int i = 0; i < kTileGroupBytes; i += 64) __builtin_prefetch(codes + kPrefetchBytes + i, 0, 3);
        I16 product = dot_group(decode, codes, x + g * stride * kGroup);
        total = accumulate(total, product, scale_of(scales, int(g)), factors[g * stride]);
    }
    store16(y, total);
}

template <int M>
inline void step(const int16_t* levels, const int16_t* x, const float* factors, F16 scale, float* y) {
    I16 products[M];
    dot_levels<M>(levels, x, products);
    for (int m = 0; m < M; m++) {
        store16(y + m * kTileRows, accumulate(load16(y + m * kTileRows), products[m], scale, factors[m]));
    }
}

template <int32_t S>
void multiply_many(const uint8_t* tile, int64_t groups, float offset, const int16_t* x, const float* factors,
                   int64_t stride, int64_t rows, float* y) {
    const uint8_t* scales = tile + groups * kTileGroupBytes;
    const ScaleReader<S> scale_of(scales, groups, offset);
    const Decoder decode;
    alignas(64) int16_t levels[kTileRows * kGroup];
    for (int64_t m = 0; m < rows; m++) store16(y + m * kTileRows, zero16());
    // Blocks of nearly equal height: seven rows are four and three rather than six and one.
    int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t* codes = tile + g * kTileGroupBytes;
        for (int i = 0; i < kTileGroupBytes; i += 64) __builtin_prefetch(codes + kPrefetchBytes + i, 0, 3);
        decode_group(decode, codes, levels);
        F16 scale = scale_of(scales, int(g));
        const int16_t* xg = x + g * stride * kGroup;
        const float* fg = factors + g * stride;
        for (int64_t b = 0, m = 0; b < blocks; b++) {
            int64_t height = (rows - m + blocks - b - 1) / (blocks - b);
            float* ym = y + m * kTileRows;
            switch (height) {
                case 1: step<1>(levels, xg + m * kGroup, fg + m, scale, ym); break;
                case 2: step<2>(levels, xg + m * kGroup, fg + m, scale, ym); break;
                case 3: step<3>(levels, xg + m * kGroup, fg + m, scale, ym); break;
                case 4: step<4>(levels, xg + m * kGroup, fg + m, scale, ym); break;
                case 5: step<5>(levels, xg + m * kGroup, fg + m, scale, ym); break;
                default: step<6>(levels, xg + m * kGroup, fg + m, scale, ym); break;
            }
            m += height;
        }
    }
}

void nf4_tile(const uint8_t* tile, int64_t groups, int32_t scale_kind, float offset, const int16_t* x,
              const float* factors, int64_t stride, int64_t rows, float* y) {
    if (scale_kind == kPackedScales) {
        if (rows == 1) return multiply_one<kPackedScales>(tile, groups, offset, x, factors, stride, y);
        return multiply_many<kPackedScales>(tile, groups, offset, x, factors, stride, rows, y);
    }
    if (rows == 1) return multiply_one<kFloatScales>(tile, groups, offset, x, factors, stride, y);
    return multiply_many<kFloatScales>(tile, groups, offset, x, factors, stride, rows, y);
}

// Activations of one row as integers and one factor per group: x = integer * factor, with the gain of the levels
// taken out of the factor as well. Groups are `stride` rows apart in both outputs. NaN and infinity give factors that
// are not finite, so they are not lost.
void quantize_row(const float* x, int64_t groups, int64_t stride, int16_t* integers, float* factors) {
    for (int64_t g = 0; g < groups; g++) {
        const float* xg = x + g * kGroup;
        vi largest = {};
        for (int i = 0; i < kGroup; i += W) {
            vi bits = (vi)load(xg + i) & 0x7fffffff;  // magnitudes order like their bits, NaN above all
            largest = bits > largest ? bits : largest;
        }
        int32_t top = 0;
        for (int i = 0; i < W; i++) top = largest[i] > top ? largest[i] : top;
        float absmax;
        memcpy(&absmax, &top, 4);
        // Below 1e-30 the reciprocal could overflow; such a group counts as zero.
        float to_integer = absmax < 1e-30f ? 0.0f : float(kLargestActivation) / absmax;
        int16_t* out = integers + g * stride * kGroup;
        for (int i = 0; i < kGroup; i += W) {
            vf scaled = round_to_int(load(xg + i) * splat(to_integer));
#if defined(__AVX2__)
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
