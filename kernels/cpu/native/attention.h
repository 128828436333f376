// Attention of a few query rows over a run of cached positions, with the running softmax of "Online normalizer
// calculation for softmax" (Milakov & Gimelshein 2018), in float32.
// The result for a query does not depend on which queries are computed with it: blocks of positions are counted from
// position 0, and runs of kSplit positions are computed one by one and merged in order.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

// Query rows that one pass over a block of positions computes together: enough that some row can be computed while
// others wait for the results of their last instructions.
constexpr int64_t kTogether = 8;

// Dot products of R (1 or 2) rows of q with 8 / R rows of `keys`, the first row's before the second's. Rows have n
// elements, a multiple of 8.
template <int R>
inline vf dot_eight(const float* q, const float* keys, int64_t n) {
    constexpr int K = 8 / R;
    vf lanes[8];
    for (int j = 0; j < 8; j++) lanes[j] = zero();
    for (int64_t i = 0; i < n; i += W) {
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            vf qi = load(q + r * n + i);
#pragma GCC unroll 8
            for (int j = 0; j < K; j++) lanes[r * K + j] = fma(qi, load(keys + j * n + i), lanes[r * K + j]);
        }
    }
    return sums(lanes);
}

// out[r][0 … 8 N) = out · corrections[r] + Σ weights[r][j] · values[j] for R rows, R · N vectors in registers.
template <int R, int N>
inline void add_values(const float (*weights)[kPositions], int64_t positions, const float* values, int64_t stride,
                       const float* corrections, float* out) {
    vf total[R][N];
    for (int r = 0; r < R; r++) {
        for (int i = 0; i < N; i++) total[r][i] = load(out + r * stride + i * W) * splat(corrections[r]);
    }
    for (int64_t j = 0; j < positions; j++) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            vf w = splat(weights[r][j]);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) total[r][i] = fma(w, load(values + j * stride + i * W), total[r][i]);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int i = 0; i < N; i++) store(out + r * stride + i * W, total[r][i]);
    }
}

template <int R>
inline void add_value_rows(const float (*weights)[kPositions], int64_t positions, const float* values, int64_t n,
                           const float* corrections, float* out) {
    constexpr int N = R == 1 ? 8 : 4;
    int64_t i = 0;
    for (; i + N * W <= n; i += N * W) add_values<R, N>(weights, positions, values + i, n, corrections, out + i);
    for (; i < n; i += W) add_values<R, 1>(weights, positions, values + i, n, corrections, out + i);
}

// Iterates over the cached rows of a run's heads, position by position, with one division in all.
class Positions {
  public:
    Positions(const AttentionRun& run, int64_t first)
        : run_(run), block_(first / run.block_size), offset_(first % run.block_size) {}
    // The index of the current position's row, in elements. Moves on to the next position.
    int64_t next() {
        int64_t slot = int64_t(run_.block_table[block_]) * run_.block_size + offset_;
        if (++offset_ == run_.block_size) {
            offset_ = 0;
            block_++;
        }
        return (slot * run_.kv_heads + run_.kv_head) * run_.head_dim;
    }

  private:
    const AttentionRun& run_;
    int64_t block_, offset_;
};

template <DType D>
inline void load_row(const typename Element<D>::type* from, int64_t n, int64_t padded, float* to) {
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
        for (int j = 0; j < 4 * W; j += W) store(to + i + j, Element<D>::load8(from + i + j));
    }
    for (; i + W <= n; i += W) store(to + i, Element<D>::load8(from + i));
    for (; i < n; i++) to[i] = Element<D>::load1(from + i);
    for (; i < padded; i++) to[i] = 0.0f;
}

// `count` positions as float32, [heads][kPositions][padded_dim] each, the rest of kPositions as zeros. Heads of one
// position are neighbours, so that the cache is read in long runs.
template <DType D>
void load_positions(const AttentionRun& run, int64_t first, int64_t count, float* keys, float* values) {
    typedef typename Element<D>::type T;
    int64_t n = run.head_dim, padded = run.padded_dim, head = kPositions * padded;
    Positions positions(run, first);
    for (int64_t j = 0; j < count; j++) {
        int64_t row = positions.next();
        for (int64_t h = 0; h < run.num_heads; h++) {
            load_row<D>((const T*)run.k_cache + row + h * n, n, padded, keys + h * head + j * padded);
            load_row<D>((const T*)run.v_cache + row + h * n, n, padded, values + h * head + j * padded);
        }
    }
    if (count == kPositions) return;
    for (int64_t h = 0; h < run.num_heads; h++) {
        memset(keys + h * head + count * padded, 0, size_t((kPositions - count) * padded) * 4);
        memset(values + h * head + count * padded, 0, size_t((kPositions - count) * padded) * 4);
    }
}

// Adds one block of positions to the states and sums of `rows` (at most kTogether) query rows, which see the first
// `seen` (1 … kPositions) of them. All rows finish a stage before the next one begins: the stages of one row wait for
// each other.
inline void attend_block(const float* q, int64_t rows, const float* keys, const float* values, int64_t n, int64_t seen,
                         SoftmaxState* states, float* out) {
    float scores[kTogether][kPositions];
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
        for (int64_t j = 0; j < kPositions; j += 4) {
            vf s = dot_eight<2>(q + r * n, keys + j * n, n);
            memcpy(scores[r] + j, &s, 16);
            memcpy(scores[r + 1] + j, (const float*)&s + 4, 16);
        }
    }
    for (; r < rows; r++) {
        for (int64_t j = 0; j < kPositions; j += 8) store(scores[r] + j, dot_eight<1>(q + r * n, keys + j * n, n));
    }
    float corrections[kTogether];
    for (r = 0; r < rows; r++) {
        for (int64_t j = seen; j < kPositions; j++) scores[r][j] = -INFINITY;
        vf largest = splat(-INFINITY);
        for (int64_t j = 0; j < kPositions; j += W) largest = vmax(largest, load(scores[r] + j));  // NaN stays NaN
        float top = max_of(largest), old_max = states[r].max;
        float new_max = top > old_max ? top : old_max;
        // Mostly the largest score does not change, and e^0 is 1.
        corrections[r] = new_max == old_max ? 1.0f : vexp(splat(old_max - new_max))[0];
        vf total = zero();
        for (int64_t j = 0; j < kPositions; j += W) {
            vf weights = vexp(load(scores[r] + j) - splat(new_max));
            store(scores[r] + j, weights);
            total += weights;
        }
        states[r] = {new_max, states[r].sum * corrections[r] + sum(total)};
    }
    r = 0;
    for (; r + 3 <= rows; r += 3) add_value_rows<3>(scores + r, seen, values, n, corrections + r, out + r * n);
    for (; r + 2 <= rows; r += 2) add_value_rows<2>(scores + r, seen, values, n, corrections + r, out + r * n);
    for (; r < rows; r++) add_value_rows<1>(scores + r, seen, values, n, corrections + r, out + r * n);
}

// Rows r = (key-value head * queries + query) * share + head; q, out: [rows][padded_dim]; states: [rows].
// Query i sees positions below run.first_limit + i; this call computes positions run.begin … run.end − 1.
// scratch: 2 * num_heads * kPositions * padded_dim floats.
void attend_run(const AttentionRun& run, const float* q, SoftmaxState* states, float* out, float* scratch) {
    int64_t n = run.padded_dim, rows = run.queries * run.share;
    int64_t head = kPositions * n;
    float *keys = scratch, *values = scratch + run.num_heads * head;
    for (int64_t r = 0; r < run.num_heads * rows; r++) states[r] = {-INFINITY, 0.0f};
    memset(out, 0, size_t(run.num_heads * rows * n) * 4);
    int64_t last = run.first_limit + run.queries - 1;
    int64_t end = run.end < last ? run.end : last;
    for (int64_t first = run.begin; first < end; first += kPositions) {
        int64_t count = end - first < kPositions ? end - first : kPositions;
        if (run.dtype == kFloat32) {
            load_positions<kFloat32>(run, first, count, keys, values);
        } else {
            load_positions<kBFloat16>(run, first, count, keys, values);
        }
        for (int64_t h = 0; h < run.num_heads; h++) {
            for (int64_t r = 0; r < rows;) {
                int64_t seen = run.first_limit + r / run.share - first;
                // Rows of one query see the same positions. So do all rows of queries that see the whole block.
                int64_t alike = seen >= count ? rows - r : run.share - r % run.share;
                int64_t together = alike < kTogether ? alike : kTogether, at = h * rows + r;
                if (seen > 0) {
                    attend_block(q + at * n, together, keys + h * head, values + h * head, n,
                                 seen < count ? seen : count, states + at, out + at * n);
                }
                r += together;
            }
        }
    }
}

// Merge the states and sums of a later run into those of the earlier runs.
void merge_runs(int64_t rows, int64_t n, const SoftmaxState* later, const float* later_out, SoftmaxState* states,
                float* out) {
    for (int64_t r = 0; r < rows; r++) {
        if (later[r].sum == 0.0f) continue;  // a run that this query does not see
        float top = later[r].max > states[r].max ? later[r].max : states[r].max;
        vf a = vexp(splat(states[r].max - top)), b = vexp(splat(later[r].max - top));
        states[r] = {top, states[r].sum * a[0] + later[r].sum * b[0]};
        for (int64_t i = 0; i < n; i += W) {
            store(out + r * n + i, load(out + r * n + i) * a + load(later_out + r * n + i) * b);
        }
    }
}

}  // namespace
}  // namespace GUANACO_ISA
}  // namespace guanaco
