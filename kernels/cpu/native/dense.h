// Products with dense rows (the output head, LoRA's A and B, weights that a checkpoint keeps dense), float32 sums.
// A row's result does not depend on the other rows: eight lanes run along k, then sum() adds them, then the tail.
#pragma once
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

// Columns that are computed at a time for many rows: four rows of float32 weights and a few rows of activations then
// stay in the first-level cache.
constexpr int64_t kChunk = 512;

// Where a block's weights come from: the matrix (in memory, or in a cache), or the float32 copy that an earlier block
// of the same chunk has kept.
enum class From { kMatrix, kMatrixAndKeep, kNear, kKept };

// Each isa_*.cpp sets kDirectLanes, kKeepLanes and kMostLanes by the number of its registers. Up to kDirectLanes rows
// of activations are multiplied while the weights are converted. With more rows, the first kKeepLanes are multiplied
// so, and the converted weights are kept for the others, which are multiplied at most kMostLanes at a time.

// lanes[m][n] += x[m] · w[n], eight lanes along k, for columns 0 … k − 1 (a multiple of 8). kept: [N][kChunk].
template <DType D, int M, int N, From F>
inline void dense_lanes(const typename Element<D>::type* w, int64_t w_stride, int64_t k, const float* const* x,
                        int64_t first, float* kept, vf (*lanes)[N]) {
    constexpr bool kPrefetch = F == From::kMatrix || F == From::kMatrixAndKeep;
    for (int64_t i = 0; i < k; i += W) {
        vf wn[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            wn[n] = F == From::kKept ? load(kept + n * kChunk + i) : Element<D>::load8(w + n * w_stride + i);
            if (F == From::kMatrixAndKeep) store(kept + n * kChunk + i, wn[n]);
            // Rows are too short for a hardware prefetcher to start.
            if (kPrefetch && i % 32 == 0) __builtin_prefetch(w + (n + N) * w_stride + i, 0, 2);
        }
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            vf xm = load(x[m] + first + i);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) lanes[m][n] = fma(xm, wn[n], lanes[m][n]);
        }
    }
}

// dense_lanes<height>, for a height of 1 … M.
template <DType D, int M, int N, From F>
inline void dense_lanes_of(int64_t height, const typename Element<D>::type* w, int64_t w_stride, int64_t k,
                           const float* const* x, int64_t first, float* kept, vf (*lanes)[N]) {
    if constexpr (M > 1) {
        if (height < M) return dense_lanes_of<D, M - 1, N, F>(height, w, w_stride, k, x, first, kept, lanes);
    }
    dense_lanes<D, M, N, F>(w, w_stride, k, x, first, kept, lanes);
}

// y[n] of one row: the sums of its lanes, plus the columns beyond the last multiple of eight.
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

// y[m][n] for M rows x[m] and N rows of w (stride k elements); y has `stride` columns. Not inlined: with several of
// these in one function, GCC 12 keeps the sums in memory.
template <DType D, int M, int N>
__attribute__((noinline)) void dense_block(const typename Element<D>::type* w, int64_t k, const float* const* x,
                                           float* y, int64_t stride) {
    vf lanes[M][N];
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) lanes[m][n] = zero();
    }
    dense_lanes<D, M, N, From::kMatrix>(w, k, k / W * W, x, 0, nullptr, lanes);
    for (int m = 0; m < M; m++) dense_finish<D, N>(w, k, x[m], lanes[m], y + m * stride);
}

// The same sums for many rows, at most kMost at a time: the first of them convert a chunk of the weights for all.
template <DType D, int N>
void dense_many(const typename Element<D>::type* w, int64_t k, const float* const* x, int64_t rows, float* y,
                int64_t stride) {
    constexpr int64_t kMost = 48;
    alignas(64) float kept[N * kChunk];
    vf lanes[kMost][N];
    int64_t whole = k / W * W;
    for (; rows > 0; rows -= kMost, x += kMost, y += kMost * stride) {
        int64_t count = rows < kMost ? rows : kMost;
        for (int64_t m = 0; m < count; m++) {
            for (int n = 0; n < N; n++) lanes[m][n] = zero();
        }
        // The blocks after the first have nearly equal heights: a block of one row would have too few independent sums
        // to keep the multipliers busy.
        int64_t direct = count < kKeepLanes ? count : kKeepLanes;
        int64_t blocks = (count - direct + kMostLanes - 1) / kMostLanes;
        for (int64_t first = 0; first < whole; first += kChunk) {
            int64_t size = whole - first < kChunk ? whole - first : kChunk;
            dense_lanes_of<D, kKeepLanes, N, From::kMatrixAndKeep>(direct, w + first, k, size, x, first, kept, lanes);
            for (int64_t b = 0, m = direct; b < blocks; b++) {
                int64_t some = (count - m + blocks - b - 1) / (blocks - b);
                dense_lanes_of<D, kMostLanes, N, From::kKept>(some, w, k, size, x + m, first, kept, lanes + m);
                m += some;
            }
        }
        for (int64_t m = 0; m < count; m++) dense_finish<D, N>(w, k, x[m], lanes[m], y + m * stride);
    }
}

template <DType D, int N, int M = kDirectLanes>
void dense_rows(const typename Element<D>::type* w, int64_t k, const float* const* x, int64_t rows, float* y,
                int64_t stride) {
    if (rows > M) return dense_many<D, N>(w, k, x, rows, y, stride);
    if constexpr (M > 1) {
        if (rows < M) return dense_rows<D, N, M - 1>(w, k, x, rows, y, stride);
    }
    dense_block<D, M, N>(w, k, x, y, stride);
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

template <DType D>
void add_row_of(const typename Element<D>::type* w, int64_t n, int64_t k, const float* x, float scale, float* y) {
    constexpr int N = 8;
    for (; n >= N; n -= N, w += N * k, y += N) {
        vf lanes[N] = {};
        float total[N];
        dense_lanes<D, 1, N, From::kNear>(w, k, k / W * W, &x, 0, nullptr, &lanes);
        dense_finish<D, N>(w, k, x, lanes, total);
        store(y, load(y) + load(total) * splat(scale));
    }
    for (; n > 0; n--, w += k, y++) {
        vf lanes[1] = {};
        float total;
        dense_lanes<D, 1, 1, From::kNear>(w, k, k / W * W, &x, 0, nullptr, &lanes);
        dense_finish<D, 1>(w, k, x, lanes, &total);
        *y += total * scale;
    }
}

// y[0 … n) += scale · w x; w: [n, k] of `dtype`, in a cache.
void add_row(const void* w, int32_t dtype, int64_t n, int64_t k, const float* x, float scale, float* y) {
    switch (dtype) {
        case kFloat32: return add_row_of<kFloat32>((const float*)w, n, k, x, scale, y);
        case kFloat16: return add_row_of<kFloat16>((const uint16_t*)w, n, k, x, scale, y);
        default: return add_row_of<kBFloat16>((const uint16_t*)w, n, k, x, scale, y);
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
