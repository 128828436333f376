// The integer product of one group of a tile, AVX2. Two pshufb look the bytes of the 16-bit levels up, an interleave
// makes the levels, pmaddwd multiplies pairs. Sixteen outputs are two registers.
#pragma once
#include "nf4_layout.h"
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

constexpr int32_t kLayout = kByteOrder;

struct I16 {
    __m256i low, high;  // rows 0-7, 8-15
};
struct F16 {
    __m256 low, high;
};

inline F16 load16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store16(float* p, F16 v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}
inline F16 zero16() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

// sum + float(product) * scale * factor. Not fused: every ISA rounds alike, and so gives the same bits.
inline F16 accumulate(F16 sum, I16 product, F16 scale, float factor) {
    __m256 f = _mm256_set1_ps(factor);
    __m256 low = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(product.low), scale.low), f);
    __m256 high = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(product.high), scale.high), f);
    return {_mm256_add_ps(sum.low, low), _mm256_add_ps(sum.high, high)};
}

// Packed scales of a group: see dynamic_value() for the arithmetic.
class PackedScales {
  public:
    PackedScales(const uint8_t* nested, float offset) : offset_(_mm256_set1_ps(offset)) {
        const float* f = (const float*)nested;
        for (int i = 0; i < 2; i++) {
            first_[i] = _mm256_loadu_ps(f + 8 * i);
            second_[i] = _mm256_loadu_ps(f + 16 + 8 * i);
            border_[i] = _mm256_loadu_si256((const __m256i*)(f + 32 + 8 * i));
        }
        base_ = _mm256_loadu_ps(kMapBase);
        slope_ = _mm256_loadu_ps(kMapSlope);
    }
    F16 operator()(const uint8_t* codes, int group) const {
        __m128i bytes = _mm_loadu_si128((const __m128i*)codes);
        __m256i g = _mm256_set1_epi32(group);
        return {half(bytes, g, 0), half(_mm_srli_si128(bytes, 8), g, 1)};
    }

  private:
    __m256 half(__m128i bytes, __m256i group, int i) const {
        __m256 x = _mm256_cvtepi32_ps(_mm256_slli_epi32(_mm256_cvtepi8_epi32(bytes), 2));
        __m256i decade = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
        __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f));
        __m256 base = _mm256_xor_ps(_mm256_permutevar8x32_ps(base_, decade), sign);
        __m256 value = _mm256_add_ps(_mm256_mul_ps(x, _mm256_permutevar8x32_ps(slope_, decade)), base);
        __m256 is_first = _mm256_castsi256_ps(_mm256_cmpgt_epi32(border_[i], group));
        __m256 nested = _mm256_blendv_ps(second_[i], first_[i], is_first);
        return _mm256_add_ps(_mm256_mul_ps(value, nested), offset_);
    }
    __m256 first_[2], second_[2], base_, slope_, offset_;
    __m256i border_[2];
};

class Decoder {
  public:
    Decoder() {
        alignas(32) uint8_t low[32], high[32];
        for (int i = 0; i < 32; i++) {
            uint16_t level = uint16_t(integer_level(i & 15));
            low[i] = uint8_t(level);
            high[i] = uint8_t(level >> 8);
        }
        low_ = _mm256_load_si256((const __m256i*)low);
        high_ = _mm256_load_si256((const __m256i*)high);
    }
    // 32 bytes of codes → levels of rows 0-7 and 8-15 for inputs (0, 1), then for inputs (2, 3).
    void operator()(const uint8_t* codes, __m256i w[4]) const {
        const __m256i nibble = _mm256_set1_epi8(15);
        __m256i bytes = _mm256_loadu_si256((const __m256i*)codes);
        __m256i a = _mm256_and_si256(bytes, nibble), b = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        __m256i a_low = _mm256_shuffle_epi8(low_, a), a_high = _mm256_shuffle_epi8(high_, a);
        __m256i b_low = _mm256_shuffle_epi8(low_, b), b_high = _mm256_shuffle_epi8(high_, b);
        w[0] = _mm256_unpacklo_epi8(a_low, a_high);
        w[1] = _mm256_unpackhi_epi8(a_low, a_high);
        w[2] = _mm256_unpacklo_epi8(b_low, b_high);
        w[3] = _mm256_unpackhi_epi8(b_low, b_high);
    }

  private:
    __m256i low_, high_;
};

inline __m256i pair(const int16_t* x) {
    int32_t two;
    memcpy(&two, x, 4);
    return _mm256_set1_epi32(two);
}

// One row of activations against a group's codes, without a detour through memory.
inline I16 dot_group(const Decoder& decode, const uint8_t* codes, const int16_t* x) {
    __m256i sum[4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 16; i++) {
        __m256i w[4];
        decode(codes + 32 * i, w);
        __m256i x0 = pair(x + 4 * i), x1 = pair(x + 4 * i + 2);
        sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(w[0], x0));
        sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(w[1], x0));
        sum[2] = _mm256_add_epi32(sum[2], _mm256_madd_epi16(w[2], x1));
        sum[3] = _mm256_add_epi32(sum[3], _mm256_madd_epi16(w[3], x1));
    }
    return {_mm256_add_epi32(sum[0], sum[2]), _mm256_add_epi32(sum[1], sum[3])};
}

// A group's levels as int16 [32 pairs of inputs][16 rows][2].
inline void decode_group(const Decoder& decode, const uint8_t* codes, int16_t* levels) {
    for (int i = 0; i < 16; i++) {
        __m256i w[4];
        decode(codes + 32 * i, w);
        for (int j = 0; j < 4; j++) _mm256_store_si256((__m256i*)levels + 4 * i + j, w[j]);
    }
}

// M rows of activations, 64 apart, against decoded levels.
template <int M>
inline void dot_levels(const int16_t* levels, const int16_t* x, I16* out) {
    __m256i low[M], high[M];
    for (int m = 0; m < M; m++) low[m] = high[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < 32; i++) {
        __m256i w0 = _mm256_load_si256((const __m256i*)levels + 2 * i);
        __m256i w1 = _mm256_load_si256((const __m256i*)levels + 2 * i + 1);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            __m256i v = pair(x + m * kGroup + 2 * i);
            low[m] = _mm256_add_epi32(low[m], _mm256_madd_epi16(w0, v));
            high[m] = _mm256_add_epi32(high[m], _mm256_madd_epi16(w1, v));
        }
    }
    for (int m = 0; m < M; m++) out[m] = {low[m], high[m]};
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
