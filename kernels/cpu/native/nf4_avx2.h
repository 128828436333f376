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

inline F16 multiply(F16 a, F16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }

inline F16 load_scales(const int16_t* p) {
    __m256i low = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p));
    __m256i high = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)));
    return {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)};
}

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
    // Levels of the low nibbles of 32 bytes, as 16-bit pairs of inputs: rows 0-7 and rows 8-15.
    void operator()(__m256i bytes, __m256i& w0, __m256i& w1) const {
        __m256i index = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
        __m256i low = _mm256_shuffle_epi8(low_, index), high = _mm256_shuffle_epi8(high_, index);
        w0 = _mm256_unpacklo_epi8(low, high);
        w1 = _mm256_unpackhi_epi8(low, high);
    }
    // Moves the high nibbles down. By multiplication, since the ports for shifts are busy with look-ups.
    static __m256i high_nibbles(__m256i bytes) { return _mm256_mulhi_epu16(bytes, _mm256_set1_epi16(0x1000)); }

  private:
    __m256i low_, high_;
};

// low += w0 · x, high += w1 · x, for the pair of activations at x. In assembler, because GCC would keep these sums in
// memory and copy them around, which costs a third of the speed.
inline void multiply_add(__m256i& low, __m256i& high, __m256i w0, __m256i w1, const int16_t* x) {
    __m256i t0, t1;
    asm("vpbroadcastd %[x], %[t1]\n\t"
        "vpmaddwd %[w0], %[t1], %[t0]\n\t"
        "vpmaddwd %[w1], %[t1], %[t1]\n\t"
        "vpaddd %[t0], %[low], %[low]\n\t"
        "vpaddd %[t1], %[high], %[high]"
        : [low] "+x"(low), [high] "+x"(high), [t0] "=&x"(t0), [t1] "=&x"(t1)
        : [w0] "x"(w0), [w1] "x"(w1), [x] "m"(*(const int16_t(*)[2])x));
}

// The sums of up to six rows. Variables rather than an array, for the same reason as above; those that M does not need
// are optimised away.
template <int M>
class RowSums {
  public:
    // w0, w1: levels of a pair of inputs; x: the first row's pair, rows being 64 apart.
    void add(__m256i w0, __m256i w1, const int16_t* x) {
        multiply_add(l0_, h0_, w0, w1, x);
        if (M > 1) multiply_add(l1_, h1_, w0, w1, x + kGroup);
        if (M > 2) multiply_add(l2_, h2_, w0, w1, x + 2 * kGroup);
        if (M > 3) multiply_add(l3_, h3_, w0, w1, x + 3 * kGroup);
        if (M > 4) multiply_add(l4_, h4_, w0, w1, x + 4 * kGroup);
        if (M > 5) multiply_add(l5_, h5_, w0, w1, x + 5 * kGroup);
    }
    void get(I16* out) const {
        out[0] = {l0_, h0_};
        if (M > 1) out[1] = {l1_, h1_};
        if (M > 2) out[2] = {l2_, h2_};
        if (M > 3) out[3] = {l3_, h3_};
        if (M > 4) out[4] = {l4_, h4_};
        if (M > 5) out[5] = {l5_, h5_};
    }

  private:
    static __m256i none() { return _mm256_setzero_si256(); }
    __m256i l0_ = none(), l1_ = none(), l2_ = none(), l3_ = none(), l4_ = none(), l5_ = none();
    __m256i h0_ = none(), h1_ = none(), h2_ = none(), h3_ = none(), h4_ = none(), h5_ = none();
};

// Products of M rows with a group's codes, decoded in registers.
template <int M>
inline void dot_codes(const Decoder& decode, const uint8_t* codes, const int16_t* x, I16* out) {
    RowSums<M> sums;
#pragma GCC unroll 2
    for (int i = 0; i < 16; i++, x += 4, codes += 32) {
        __m256i bytes = _mm256_loadu_si256((const __m256i*)codes), w0, w1;
        decode(bytes, w0, w1);
        sums.add(w0, w1, x);
        decode(Decoder::high_nibbles(bytes), w0, w1);
        sums.add(w0, w1, x + 2);
    }
    sums.get(out);
}

// The same, and the group's levels are stored for further rows, as int16 [32 pairs of inputs][16 rows][2]. One loop
// does both, since look-ups and multiplications use different ports.
template <int M>
inline void dot_and_decode(const Decoder& decode, const uint8_t* codes, const int16_t* x, int16_t* levels, I16* out) {
    RowSums<M> sums;
    __m256i* w = (__m256i*)levels;
    for (int i = 0; i < 16; i++, x += 4, w += 4, codes += 32) {
        __m256i bytes = _mm256_loadu_si256((const __m256i*)codes), w0, w1;
        decode(bytes, w0, w1);
        _mm256_store_si256(w, w0);
        _mm256_store_si256(w + 1, w1);
        sums.add(w0, w1, x);
        decode(Decoder::high_nibbles(bytes), w0, w1);
        _mm256_store_si256(w + 2, w0);
        _mm256_store_si256(w + 3, w1);
        sums.add(w0, w1, x + 2);
    }
    sums.get(out);
}

// Products of M rows with decoded levels.
template <int M>
inline void dot_levels(const int16_t* levels, const int16_t* x, I16* out) {
    RowSums<M> sums;
    const __m256i* w = (const __m256i*)levels;
#pragma GCC unroll 2
    for (int i = 0; i < 32; i++, x += 2, w += 2) sums.add(w[0], w[1], x);
    sums.get(out);
}

// A group of T neighbouring tiles with M rows; one at a time: sixteen registers hold the sums of one tile.
constexpr int kTilesAtOnce = 1;
template <int T, int M>
inline void dot_tiles(const Decoder& decode, const uint8_t* codes, int64_t, const int16_t* x, I16* out) {
    static_assert(T == 1, "the stride is not used");
    dot_codes<M>(decode, codes, x, out);
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
