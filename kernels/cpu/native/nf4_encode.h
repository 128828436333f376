// Quantising to NF4: groups of 64 stored values → packed codes and scales, bit for bit as bitsandbytes makes them.
#pragma once
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

// Half way between neighbouring levels, in float32; kernels/nf4.py has the levels (QLoRA, appendix E).
constexpr int kThresholds = 15;
constexpr float kLevels[kThresholds + 1] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
constexpr float kSmallestScale = 1e-38f;  // a group of zeros is divided by this
constexpr int32_t kInfinityBits = 0x7f800000;

inline vi imax(vi a, vi b) { return a > b ? a : b; }

// One group: its largest absolute value, 32 bytes of codes. False if a value is NaN or infinite.
template <DType D>
bool encode_group(const typename Element<D>::type* x, uint8_t* packed, float* scale) {
    vf v[kGroup / W];
    vi largest = {};
    for (int i = 0; i < kGroup / W; i++) {
        v[i] = Element<D>::load8(x + i * W);
        // The bits of positive floats are in the floats' order, and those of NaN are above all of them.
        largest = imax(largest, (vi)v[i] & 0x7fffffff);
    }
    int32_t bits = max_of(largest);
    if (bits >= kInfinityBits) return false;
    float absmax;
    memcpy(&absmax, &bits, 4);
    *scale = absmax;
    // A product with the reciprocal, as in bitsandbytes: a division would round otherwise.
    vf factor = splat(1.0f / (absmax > kSmallestScale ? absmax : kSmallestScale));
    uint8_t codes[kGroup];
    for (int i = 0; i < kGroup / W; i++) {
        vf normal = v[i] * factor;
        vi code = {};
        for (int t = 0; t < kThresholds; t++) {
            code -= (vi)(normal > splat((kLevels[t] + kLevels[t + 1]) / 2.0f));  // true is -1
        }
        for (int j = 0; j < W; j++) codes[i * W + j] = uint8_t(code[j]);
    }
    for (int i = 0; i < kGroup / 2; i++) packed[i] = uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
    return true;
}

template <DType D>
bool encode_groups_of(const typename Element<D>::type* x, int64_t count, uint8_t* packed, float* scales) {
    bool finite = true;
    for (int64_t g = 0; g < count; g++) {
        finite &= encode_group<D>(x + g * kGroup, packed + g * (kGroup / 2), scales + g);
    }
    return finite;
}

// Groups first … first + count − 1 of values x in `dtype`. False if a value is NaN or infinite.
bool encode_groups(const void* x, int32_t dtype, int64_t first, int64_t count, uint8_t* packed, float* scales) {
    packed += first * (kGroup / 2);
    scales += first;
    switch (dtype) {
        case kFloat32: return encode_groups_of<kFloat32>((const float*)x + first * kGroup, count, packed, scales);
        case kFloat16: return encode_groups_of<kFloat16>((const uint16_t*)x + first * kGroup, count, packed, scales);
        default: return encode_groups_of<kBFloat16>((const uint16_t*)x + first * kGroup, count, packed, scales);
    }
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
