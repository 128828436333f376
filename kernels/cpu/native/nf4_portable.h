// The integer product of one group of a tile without look-up instructions: for processors without AVX2, and as the
// specification of the other cores.
#pragma once
#include "nf4_layout.h"
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

constexpr int32_t kLayout = kByteOrder;

struct I16 {
    int32_t lane[kTileRows];
};
struct F16 {
    vf low, high;
};

inline F16 load16(const float* p) { return {load(p), load(p + 8)}; }
inline void store16(float* p, F16 v) {
    store(p, v.low);
    store(p + 8, v.high);
}
inline F16 zero16() { return {zero(), zero()}; }
inline F16 multiply(F16 a, F16 b) { return {a.low * b.low, a.high * b.high}; }

// sum + float(product) * scale * factor, with the roundings of every ISA.
inline F16 accumulate(F16 sum, const I16& product, F16 scale, float factor) {
    vi low, high;
    memcpy(&low, product.lane, 32);
    memcpy(&high, product.lane + 8, 32);
    vf f = splat(factor);
    return {sum.low + __builtin_convertvector(low, vf) * scale.low * f,
            sum.high + __builtin_convertvector(high, vf) * scale.high * f};
}

inline F16 load_scales(const int16_t* p) {
    F16 s;
    for (int i = 0; i < 8; i++) {
        s.low[i] = float(p[i]);
        s.high[i] = float(p[8 + i]);
    }
    return s;
}

class Decoder {
  public:
    Decoder() {
        for (int i = 0; i < 16; i++) level_[i] = integer_level(i);
    }
    int16_t operator()(int code) const { return level_[code]; }

  private:
    int16_t level_[16];
};

// A group's levels as int16 [32 pairs of inputs][16 rows][2].
inline void decode_group(const Decoder& decode, const uint8_t* codes, int16_t* levels) {
    for (int chunk = 0; chunk < 16; chunk++) {
        for (int i = 0; i < 32; i++) {
            int row = i / 16 * 4 + i % 16 / 8 * 8 + i % 8 / 2;
            int16_t* to = levels + chunk * 64 + row * 2 + i % 2;
            uint8_t byte = codes[chunk * 32 + i];
            to[0] = decode(byte & 15);
            to[32] = decode(byte >> 4);
        }
    }
}

// Products of M rows with decoded levels. Sums are unsigned, so that they may wrap: if activations are not finite, the
// integers may have any value, and the factor is not finite.
template <int M>
inline void dot_levels(const int16_t* levels, const int16_t* x, I16* out) {
    for (int m = 0; m < M; m++) {
        vu low = {}, high = {};
        for (int i = 0; i < 32; i++) {
            int32_t x0 = x[m * kGroup + 2 * i], x1 = x[m * kGroup + 2 * i + 1];
            const int16_t* w = levels + 32 * i;
#if defined(__SSE2__)
            __m128i v = _mm_set1_epi32(int32_t(uint32_t(uint16_t(x0)) | uint32_t(x1) << 16));
            __m128i p[4];
            for (int j = 0; j < 4; j++) p[j] = _mm_madd_epi16(_mm_loadu_si128((const __m128i*)w + j), v);
            vu a, b;
            memcpy(&a, p, 32);
            memcpy(&b, p + 2, 32);
            low += a;
            high += b;
#else
            for (int j = 0; j < 8; j++) {
                low[j] += uint32_t(w[2 * j] * x0) + uint32_t(w[2 * j + 1] * x1);
                high[j] += uint32_t(w[16 + 2 * j] * x0) + uint32_t(w[16 + 2 * j + 1] * x1);
            }
#endif
        }
        memcpy(out[m].lane, &low, 32);
        memcpy(out[m].lane + 8, &high, 32);
    }
}

template <int M>
inline void dot_and_decode(const Decoder& decode, const uint8_t* codes, const int16_t* x, int16_t* levels, I16* out) {
    decode_group(decode, codes, levels);
    dot_levels<M>(levels, x, out);
}

template <int M>
inline void dot_codes(const Decoder& decode, const uint8_t* codes, const int16_t* x, I16* out) {
    int16_t levels[kTileRows * kGroup];
    dot_and_decode<M>(decode, codes, x, levels, out);
}

// A group of T neighbouring tiles with M rows. One tile at a time, since more would not be faster.
constexpr int kTilesAtOnce = 1;
template <int T, int M>
inline void dot_tiles(const Decoder& decode, const uint8_t* codes, int64_t, const int16_t* x, I16* out) {
    static_assert(T == 1, "the stride is not used");
    dot_codes<M>(decode, codes, x, out);
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
