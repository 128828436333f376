// Products with dense rows (the output head, LoRA's A and B, weights that a checkpoint keeps dense), float32 sums.
// A result depends neither on how many rows are computed together nor on their number: eight lanes run along k, then
// sum() adds them, then the tail.
#pragma once
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

// How much of k many rows take at a time: four rows of weights, as float32, and a few of activations stay in the
// first-level cache.
constexpr int64_t kChunk = 512;
// Rows of activations from which on weights are converted once for all of them.
constexpr int64_t kManyRows = 12;

// lanes[m][n] += x[m] · w[n], eight lanes along k, for columns 0 … k − 1 (a multiple of 8).
template <DType D, int M, int N>
inline void dense_lanes(const typename Element<D>::type* w, int64_t w_stride, int64_t k, const float* const* x,
                        int64_t first, vf (*lanes)[N]) {
    for (int64_t i = 0; i < k; i += W) {
        vf wn[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            wn[n] = Element<D>::load8(w + n * w_stride + i);
            // Rows are shorter than what a hardware prefetcher needs to get going.
            if (M == 1 && i % 32 == 0) __builtin_prefetch(w + (n + N) * w_stride + i, 0, 2);
        }
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            vf xm = load(x[m] + first + i);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) lanes[m][n] = fma(xm, wn[n], lanes[m][n]);
        }
    }
}

// y[n] of one row from its lanes, and what is left of k beyond a multiple of eight.
template <DType D, int N>
inline void dense_finish(const typename Element<D>::type* w, int64_t k, const float* x, const vf* lanes, float* y) {
    float total[N];
    if (N == 8) {
        store(total, sums(lanes));
    } else {
        for (int n = 0; n < N; n++) total[n] = sum(lanes[n]);
    }
    for (int n = 0; n < N; n++) {
        for (int64_t i = k / W * W; i < k; i++) total[n] += x[i] * Element<D>::load1(w + n * k + i);
        y[n] = total[n];
    }
}

// y[m][n] for M rows x[m] and N rows of w (stride k elements); y has `stride` columns.
template <DType D, int M, int N>
inline void dense_block(const typename Element<D>::type* w, int64_t k, const float* const* x, float* y, int64_t stride) {
    vf lanes[M][N];
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) lanes[m][n] = zero();
    }
    dense_lanes<D, M, N>(w, k, k / W * W, x, 0, lanes);
    for (int m = 0; m < M; m++) dense_finish<D, N>(w, k, x[m], lanes[m], y + m * stride);
}

// The same sums for many rows, at most kMost of them: a chunk of the weights is converted once for all.
template <DType D>
void dense_many(const typename Element<D>::type* w, int64_t k, const float* const* x, int64_t rows, float* y,
                int64_t stride) {
    constexpr int N = 4;
    constexpr int64_t kMost = 48;
    alignas(64) float converted[N * kChunk];
    vf lanes[kMost][N];
    int64_t whole = k / W * W;
    for (; rows > 0; rows -= kMost, x += kMost, y += kMost * stride) {
        int64_t count = rows < kMost ? rows : kMost;
        for (int64_t m = 0; m < count; m++) {
            for (int n = 0; n < N; n++) lanes[m][n] = zero();
        }
        for (int64_t first = 0; first < whole; first += kChunk) {
            int64_t size = whole - first < kChunk ? whole - first : kChunk;
            for (int n = 0; n < N; n++) {
                for (int64_t i = 0; i < size; i += W) {
                    store(converted + n * kChunk + i, Element<D>::load8(w + n * k + first + i));
                    if (i % 32 == 0) __builtin_prefetch(w + (n + N) * k + first + i, 0, 3);
                }
            }
            // Sixes where there are 32 registers, threes and twos: a single row has too few sums under way at a time to
            // keep the multipliers busy.
            int64_t m = 0;
            for (; kManyLanes && count - m >= 6; m += 6) {
                dense_lanes<kFloat32, 6, N>(converted, kChunk, size, x + m, first, lanes + m);
            }
            for (; count - m > 4 || count - m == 3; m += 3) {
                dense_lanes<kFloat32, 3, N>(converted, kChunk, size, x + m, first, lanes + m);
            }
            for (; count - m >= 2; m += 2) {
                dense_lanes<kFloat32, 2, N>(converted, kChunk, size, x + m, first, lanes + m);
            }
            if (m < count) dense_lanes<kFloat32, 1, N>(converted, kChunk, size, x + m, first, lanes + m);
        }
        for (int64_t m = 0; m < count; m++) dense_finish<D, N>(w, k, x[m], lanes[m], y + m * stride);
    }
}

template <DType D, int N>
void dense_rows(const typename Element<D>::type* w, int64_t k, const float* const* x, int64_t rows, float* y,
                int64_t stride) {
    if (N == 4 && rows >= kManyRows) return dense_many<D>(w, k, x, rows, y, stride);
    int64_t m = 0;
    // Pairs: three rows' sums and their operands are one more than there are registers.
    for (; m + 2 <= rows; m += 2) dense_block<D, 2, N>(w, k, x + m, y + m * stride, stride);
    if (m < rows) dense_block<D, 1, N>(w, k, x + m, y + m * stride, stride);
}

template <DType D>
void dense_tile_of(const typename Element<D>::type* w, int64_t n, int64_t k, const float* const* x, int64_t rows,
                   float* y, int64_t stride) {
    int64_t j = 0;
    if (rows == 1) {
        for (; j + 8 <= n; j += 8) dense_block<D, 1, 8>(w + j * k, k, x, y + j, stride);
    }
    for (; j + 4 <= n; j += 4) dense_rows<D, 4>(w + j * k, k, x, rows, y + j, stride);
    for (; j < n; j++) dense_rows<D, 1>(w + j * k, k, x, rows, y + j, stride);
}

// y[m][0 … n) for rows x[m]; w: [n, k] of `dtype`; y has `stride` columns.
void dense_tile(const void* w, int32_t dtype, int64_t n, int64_t k, const float* const* x, int64_t rows, float* y,
                int64_t stride) {
    switch (dtype) {
        case kFloat32: return dense_tile_of<kFloat32>((const float*)w, n, k, x, rows, y, stride);
        case kFloat16: return dense_tile_of<kFloat16>((const uint16_t*)w, n, k, x, rows, y, stride);
        default: return dense_tile_of<kBFloat16>((const uint16_t*)w, n, k, x, rows, y, stride);
    }
}

// Elements first … first + count − 1 of a flattened NF4 matrix in bitsandbytes' own order, in float32.
void decode_flat(const uint8_t* packed, const float* scales, int64_t first, int64_t count, float* out) {
    static const float levels[16] = {
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
    };
    for (int64_t i = 0; i < count; i++) {
        int64_t at = first + i;
        int code = at % 2 == 0 ? packed[at / 2] >> 4 : packed[at / 2] & 15;
        out[i] = levels[code] * scales[at / 64];
    }
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
