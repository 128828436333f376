// The integer product of one group of a tile, AVX-512. vpermw looks up 32 levels at once. Its table has the 16 levels
// twice, so only the lowest four bits of a word count; shifts move the others down. Sixteen outputs are one
// register, and with VNNI one instruction multiplies and adds.
// With GUANACO_EMULATE_AVX512 the same source is made from plain vectors, for tests on processors without it.
#pragma once
#include "nf4_layout.h"
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

constexpr int32_t kLayout = kWordOrder;

typedef uint16_t words __attribute__((vector_size(64)));
typedef uint16_t words_unaligned __attribute__((vector_size(64), aligned(1), may_alias));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t uints __attribute__((vector_size(64)));
typedef float F16 __attribute__((vector_size(64)));
typedef float floats_unaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef int16_t scales_unaligned __attribute__((vector_size(32), aligned(2), may_alias));

inline words load_words(const void* p) { return *(const words_unaligned*)p; }
inline void store_words(void* p, words v) { *(words_unaligned*)p = v; }
inline F16 load16(const float* p) { return *(const floats_unaligned*)p; }
inline void store16(float* p, F16 v) { *(floats_unaligned*)p = v; }
inline F16 zero16() { return F16{}; }
inline F16 multiply(F16 a, F16 b) { return a * b; }

// sum + float(product) * scale * factor, with the roundings of every ISA.
inline F16 accumulate(F16 sum, I16 product, F16 scale, float factor) {
    return sum + __builtin_convertvector(product, F16) * scale * factor;
}

inline F16 load_scales(const int16_t* p) {
#if defined(GUANACO_EMULATE_AVX512)
    return __builtin_convertvector(*(const scales_unaligned*)p, F16);
#else
    // Written so because GCC 12 would otherwise convert two halves and join them.
    return (F16)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)));
#endif
}

// table[the low five bits of each word]
inline words look_up(words table, words v) {
#if defined(GUANACO_EMULATE_AVX512)
    uint16_t entries[32], lanes[32];
    memcpy(entries, &table, 64);
    memcpy(lanes, &v, 64);
    for (int i = 0; i < 32; i++) lanes[i] = entries[lanes[i] & 31];
    return load_words(lanes);
#else
    return (words)_mm512_permutexvar_epi16((__m512i)v, (__m512i)table);
#endif
}

// sum + w · x, for the pair of activations at x.
inline I16 multiply_add(I16 sum, words w, const int16_t* x) {
#if defined(GUANACO_EMULATE_AVX512)
    int16_t levels[32];
    uint32_t lanes[16];  // they wrap, as the instruction does
    memcpy(levels, &w, 64);
    memcpy(lanes, &sum, 64);
    for (int i = 0; i < 16; i++) {
        lanes[i] += uint32_t(levels[2 * i] * x[0]) + uint32_t(levels[2 * i + 1] * x[1]);
    }
    memcpy(&sum, lanes, 64);
    return sum;
#else
    int32_t pair;
    memcpy(&pair, x, 4);
#if defined(GUANACO_HAS_VNNI)
    return (I16)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(pair));
#else
    return (I16)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(pair)));
#endif
#endif
}

class Decoder {
  public:
    Decoder() {
        for (int i = 0; i < 32; i++) table_[i] = uint16_t(integer_level(i & 15));
    }
    words operator()(words codes) const { return look_up(table_, codes); }

  private:
    words table_;
};

// The sums of M rows. If there are few rows, each has several sums, since an addition waits for the one before it.
template <int M>
class RowSums {
  public:
    // w: levels of pair number `pair`; x: the first row's pair, rows being 64 apart.
    void add(int pair, words w, const int16_t* x) {
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) sums_[m][pair % kParts] = multiply_add(sums_[m][pair % kParts], w, x + m * kGroup);
    }
    void get(I16* out) const {
        for (int m = 0; m < M; m++) {
            out[m] = sums_[m][0];
            for (int i = 1; i < kParts; i++) out[m] = (I16)((uints)out[m] + (uints)sums_[m][i]);
        }
    }

  private:
    static constexpr int kParts = M <= 4 ? 4 : M <= 8 ? 2 : 1;
    I16 sums_[M][kParts] = {};
};

// Products of M rows with a group's codes. With Keep, the levels are stored for further rows, as int16 [32 pairs of
// inputs][16 rows][2]. Decoding overlaps with the products: on Zen 4 look-ups can use ports that vpdpwssd does not.
template <int M, bool Keep>
inline void dot_group(const Decoder& decode, const uint8_t* codes, const int16_t* x, int16_t* levels, I16* out) {
    RowSums<M> sums;
#pragma GCC unroll 2
    for (int i = 0; i < 8; i++, x += 8, codes += 64) {
        words packed = load_words(codes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            words w = decode(packed >> (4 * j));
            if (Keep) store_words(levels + (4 * i + j) * 32, w);
            sums.add(j, w, x + 2 * j);
        }
    }
    sums.get(out);
}

// A group of T neighbouring tiles, `tile` bytes apart, with M rows, side by side: memory is faster with several streams
// than with one, and an activation is loaded once for all of them. out: [T][M].
constexpr int kTilesAtOnce = 8;
constexpr int64_t kStreamPrefetchBytes = 1024;  // 2048 and more were a little slower on Zen 4
template <int T, int M>
inline void dot_tiles(const Decoder& decode, const uint8_t* codes, int64_t tile, const int16_t* x, I16* out) {
    constexpr int kParts = T * M <= 2 ? 4 : T * M <= 8 ? 2 : 1;
    I16 sums[T][M][kParts] = {};
    for (int i = 0; i < 8; i++, x += 8, codes += 64) {
        words packed[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            // Into the second-level cache: the first allows too few outstanding requests for the memory's bandwidth.
            __builtin_prefetch(codes + t * tile + kStreamPrefetchBytes, 0, 2);
            packed[t] = load_words(codes + t * tile);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                words w = decode(packed[t] >> (4 * j));
#pragma GCC unroll 5
                for (int m = 0; m < M; m++) {
                    I16& sum = sums[t][m][j % kParts];
                    sum = multiply_add(sum, w, x + m * kGroup + 2 * j);
                }
            }
            // GCC would otherwise load the activations of all four pairs first, and keep some of the sums in memory.
            if constexpr (T * M > 8) asm volatile("" ::: "memory");
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
#pragma GCC unroll 5
        for (int m = 0; m < M; m++) {
            uints total = (uints)sums[t][m][0];
            for (int i = 1; i < kParts; i++) total += (uints)sums[t][m][i];
            out[t * M + m] = (I16)total;
        }
    }
}

template <int M>
inline void dot_codes(const Decoder& decode, const uint8_t* codes, const int16_t* x, I16* out) {
    dot_group<M, false>(decode, codes, x, nullptr, out);
}

template <int M>
inline void dot_and_decode(const Decoder& decode, const uint8_t* codes, const int16_t* x, int16_t* levels, I16* out) {
    dot_group<M, true>(decode, codes, x, levels, out);
}

// Products of M rows with decoded levels.
template <int M>
inline void dot_levels(const int16_t* levels, const int16_t* x, I16* out) {
    RowSums<M> sums;
    for (int i = 0; i < 8; i++, x += 8, levels += 128) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums.add(j, load_words(levels + j * 32), x + 2 * j);
    }
    sums.get(out);
}

// table[the low four bits of each word]
inline F16 look_up_floats(F16 table, uints v) {
#if defined(GUANACO_EMULATE_AVX512)
    F16 out;
    for (int i = 0; i < 16; i++) out[i] = table[v[i] & 15];
    return out;
#else
    return (F16)_mm512_permutexvar_ps((__m512i)v, (__m512)table);
#endif
}

// Sixteen columns of sixteen rows become sixteen rows.
inline void transpose16(F16* v) {
#if defined(GUANACO_EMULATE_AVX512)
    F16 rows[16];
    for (int r = 0; r < 16; r++) {
        for (int k = 0; k < 16; k++) rows[r][k] = v[k][r];
    }
    memcpy(v, rows, sizeof(rows));
#else
    F16 t[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // within each quarter of 128 bits: 4 x 4
        __m512 a = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]), b = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
        __m512 c = _mm512_unpacklo_ps((__m512)v[i + 2], (__m512)v[i + 3]);
        __m512 d = _mm512_unpackhi_ps((__m512)v[i + 2], (__m512)v[i + 3]);
        t[i] = (F16)_mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = (F16)_mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = (F16)_mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = (F16)_mm512_shuffle_ps(b, d, 0xee);
    }
    // t[4 i + j] has columns 4 i … 4 i + 3 of rows j, 4 + j, 8 + j, 12 + j: quarters of 4 x 4 vectors change places.
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 a = (__m512)t[j], b = (__m512)t[4 + j], c = (__m512)t[8 + j], d = (__m512)t[12 + j];
        __m512 ab_even = _mm512_shuffle_f32x4(a, b, 0x88), ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
        __m512 cd_even = _mm512_shuffle_f32x4(c, d, 0x88), cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
        v[j] = (F16)_mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
        v[4 + j] = (F16)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
        v[8 + j] = (F16)_mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
        v[12 + j] = (F16)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
    }
#endif
}

// A group's weights, level · factor of the row: rows first … first + rows − 1, `stride` apart, 64 inputs of each.
inline void decode_group_rows(const uint8_t* codes, F16 factors, int64_t first, int64_t rows, float* out, int64_t stride) {
    const F16 levels = load16(kFloatLevels);
    for (int i = 0; i < 4; i++, codes += 128, out += 16) {
        // 32 bits are eight inputs of one row: 0, 2, 4, 6 in the low half, 1, 3, 5, 7 in the high half.
        const uints packed[2] = {(uints)load_words(codes), (uints)load_words(codes + 64)};
        F16 v[16];
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) {
            v[k] = multiply(look_up_floats(levels, packed[k / 8] >> (k % 8 / 2 * 4 + k % 2 * 16)), factors);
        }
        transpose16(v);
        if (rows == kTileRows) {
#pragma GCC unroll 16
            for (int r = 0; r < kTileRows; r++) store16(out + r * stride, v[r]);
        } else {
            for (int64_t r = 0; r < rows; r++) store16(out + r * stride, v[first + r]);
        }
    }
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
