// Eight float lanes, in the vector extension of GCC and Clang, for everything but the NF4 product: the same source
// makes SSE2, NEON, AVX2 or AVX-512VL code. Included once per ISA, inside that ISA's namespace, so that the linker does
// not merge it with another ISA's copy. Sums have the same order on every ISA, but products and sums are fused if there
// is FMA.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace guanaco {
namespace GUANACO_ISA {
namespace {

constexpr int W = 8;
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(16)));
typedef float vf_unaligned __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(16), aligned(2), may_alias));

inline vf load(const float* p) { return *(const vf_unaligned*)p; }
inline void store(float* p, vf v) { *(vf_unaligned*)p = v; }
inline vf splat(float x) { return vf{x, x, x, x, x, x, x, x}; }
inline vf zero() { return vf{}; }

inline vf fma(vf a, vf b, vf c) {
#if defined(GUANACO_HAS_AVX2)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline vf vmax(vf a, vf b) {
#if defined(GUANACO_HAS_AVX2)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline float bf16_to_float(uint16_t h) {
    uint32_t u = uint32_t(h) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// Round to nearest, ties to even, as torch does; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff, u;
    if (rest >= 0x7c00) {
        u = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        u = sign | ((rest << 13) + (112u << 23));
    } else {
        float f = float(rest) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
        return sign ? -f : f;
    }
    float f;
    memcpy(&f, &u, 4);
    return f;
}

inline vf load_bf16(const uint16_t* p) {
#if defined(GUANACO_HAS_AVX2)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vh h = *(const vh_unaligned*)p;
    vu u = __builtin_convertvector(h, vu) << 16;
    return (vf)u;
#endif
}

inline vf load_half(const uint16_t* p) {
#if defined(GUANACO_HAS_AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf v;
    for (int i = 0; i < W; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
}

inline void store_bf16(uint16_t* p, vf v) {
    vu u = (vu)v;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu is_nan = (vu)((u & 0x7fffffff) > 0x7f800000);
    rounded = (is_nan & 0x7fc0) | (~is_nan & rounded);
#if defined(GUANACO_HAS_AVX2)
    __m256i packed = _mm256_packus_epi32((__m256i)rounded, _mm256_setzero_si256());
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    *(vh_unaligned*)p = __builtin_convertvector(rounded, vh);
#endif
}

// Reads elements of any stored type as float32, eight at a time or one.
template <DType D>
struct Element;
template <>
struct Element<kFloat32> {
    typedef float type;
    static vf load8(const float* p) { return load(p); }
    static float load1(const float* p) { return *p; }
    static void store8(float* p, vf v) { store(p, v); }
    static void store1(float* p, float v) { *p = v; }
};
template <>
struct Element<kFloat16> {
    typedef uint16_t type;
    static vf load8(const uint16_t* p) { return load_half(p); }
    static float load1(const uint16_t* p) { return half_to_float(*p); }
};
template <>
struct Element<kBFloat16> {
    typedef uint16_t type;
    static vf load8(const uint16_t* p) { return load_bf16(p); }
    static float load1(const uint16_t* p) { return bf16_to_float(*p); }
    static void store8(uint16_t* p, vf v) { store_bf16(p, v); }
    static void store1(uint16_t* p, float v) { *p = float_to_bf16(v); }
};

inline float sum(vf v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// The eight sums of eight vectors, each added up in the order of sum().
inline vf sums(const vf* a) {
#if defined(GUANACO_HAS_AVX2)
    __m256 t[4];
    for (int i = 0; i < 4; i++) {  // low halves of a[i], a[i + 4] plus their high halves
        __m256 x = (__m256)a[i], y = (__m256)a[i + 4];
        t[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
    }
    __m256 u[2];
    for (int i = 0; i < 2; i++) {  // lanes (0 + 2, 1 + 3) of t[i] and t[i + 2]
        __m256d x = _mm256_castps_pd(t[i]), y = _mm256_castps_pd(t[i + 2]);
        u[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    // u[0] = (a0 even, a0 odd, a2 even, a2 odd | a4 …, a6 …), u[1] the same of a1, a3, a5, a7
    __m256 even = _mm256_shuffle_ps(u[0], u[1], 0x88), odd = _mm256_shuffle_ps(u[0], u[1], 0xdd);
    __m256 r = _mm256_add_ps(even, odd);  // a0 a2 a1 a3 | a4 a6 a5 a7
    return (vf)_mm256_shuffle_ps(r, r, 0xd8);
#else
    vf r;
    for (int i = 0; i < W; i++) r[i] = sum(a[i]);
    return r;
#endif
}

inline float max_of(vf v) {
#if defined(GUANACO_HAS_AVX2)
    __m256 m = _mm256_max_ps((__m256)v, _mm256_permute2f128_ps((__m256)v, (__m256)v, 1));
    m = _mm256_max_ps(m, _mm256_shuffle_ps(m, m, 0x4e));
    return ((vf)_mm256_max_ps(m, _mm256_shuffle_ps(m, m, 0xb1)))[0];
#else
    float m = v[0];
    for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

inline int32_t max_of(vi v) {
#if defined(GUANACO_HAS_AVX2)
    __m256i m = _mm256_max_epi32((__m256i)v, _mm256_permute2x128_si256((__m256i)v, (__m256i)v, 1));
    m = _mm256_max_epi32(m, _mm256_shuffle_epi32(m, 0x4e));
    return _mm256_cvtsi256_si32(_mm256_max_epi32(m, _mm256_shuffle_epi32(m, 0xb1)));
#else
    int32_t m = v[0];
    for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

inline vf round_to_int(vf x) {
#if defined(GUANACO_HAS_AVX2)
    return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    // Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to nearest; the compiler may not simplify it (no fast-math).
    vf magic = splat(12582912.0f);
    return (x + magic) - magic;
#endif
}

// e^x for x <= 88, to about 1e-7 relative; 0 below -87. e^x = 2^n e^r with |r| <= ln 2 / 2, and e^r by its Taylor
// polynomial of degree 7, whose remainder is r^8 / 8! < 5e-9.
inline vf vexp(vf x) {
    vf floor = splat(-87.0f);
    vi below = x < floor;
    x = vmax(floor, x);  // in this order NaN stays NaN
    vf n = round_to_int(x * splat(1.44269504f));
    vf r = fma(n, splat(-0.693145752f), x);  // ln 2 in two parts, the first short enough that n times it is exact
    r = fma(n, splat(-1.42860677e-6f), r);
    vf p = splat(1.0f / 5040);
    p = fma(p, r, splat(1.0f / 720));
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
    vf result = p * (vf)exponent;
    return (vf)((vi)result & ~below);
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
