// RMSNorm, rotary embedding, SwiGLU and conversions, a row at a time, in float32.
#pragma once
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

template <DType D>
void to_float_of(const typename Element<D>::type* x, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, Element<D>::load8(x + i));
    for (; i < n; i++) out[i] = Element<D>::load1(x + i);
}

void to_float(const void* x, int32_t dtype, int64_t n, float* out) {
    switch (dtype) {
        case kFloat32: memcpy(out, x, size_t(n) * 4); return;
        case kFloat16: return to_float_of<kFloat16>((const uint16_t*)x, n, out);
        default: return to_float_of<kBFloat16>((const uint16_t*)x, n, out);
    }
}

// To float32 or bfloat16, the two dtypes of activations and caches.
void from_float(const float* x, int64_t n, void* out, int32_t dtype) {
    if (dtype == kFloat32) {
        memcpy(out, x, size_t(n) * 4);
        return;
    }
    uint16_t* o = (uint16_t*)out;
    int64_t i = 0;
    for (; i + W <= n; i += W) store_bf16(o + i, load(x + i));
    for (; i < n; i++) o[i] = float_to_bf16(x[i]);
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    vf squares[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        for (int j = 0; j < 4; j++) {
            vf v = load(x + i + j * W);
            squares[j] = fma(v, v, squares[j]);
        }
    }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < n; i++) total += x[i] * x[i];
    float inverse = 1.0f / sqrtf(total / float(n) + eps);
    for (i = 0; i + W <= n; i += W) store(out + i, load(x + i) * splat(inverse) * load(weight + i));
    for (; i < n; i++) out[i] = x[i] * inverse * weight[i];
}

// out = gate · sigmoid(gate) · up. `out` may be `gate` or `up`.
void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
    int64_t i = 0;
    vf limit = splat(87.0f);
    for (; i + W <= n; i += W) {
        vf g = load(gate + i), minus = -g;
        // e^-g of a very negative gate would overflow vexp; e^87 makes the quotient small enough.
        vf e = vexp(minus > limit ? limit : minus);
        store(out + i, g / (splat(1.0f) + e) * load(up + i));
    }
    for (; i < n; i++) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

// e^((x - largest) / temperature)
void exp_row(const float* x, int64_t n, float largest, float temperature, float* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, vexp((load(x + i) - splat(largest)) / splat(temperature)));
    for (; i < n; i++) out[i] = vexp(splat((x[i] - largest) / temperature))[0];
}

// Rotate the pairs (i, i + half) of one head.
void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

void add(const float* x, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(to + i) + load(x + i));
    for (; i < n; i++) to[i] += x[i];
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
