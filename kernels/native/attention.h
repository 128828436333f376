// Attention of a few query rows over a run of cached positions, with the running softmax of "Online normalizer
// calculation for softmax" (Milakov & Gimelshein 2018), in float32.
// The result for a query does not depend on which queries are computed with it: positions are taken in blocks counted
// from position 0, and runs of kSplit positions are finished one by one and merged in order.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace guanaco {
namespace GUANACO_ISA {
namespace {

// Dot products of q with eight rows of `keys`, n (a multiple of 8) apart.
inline vf dot_eight(const float* q, const float* keys, int64_t n) {
    vf lanes[8];
    for (int j = 0; j < 8; j++) lanes[j] = zero();
    for (int64_t i = 0; i < n; i += W) {
        vf qi = load(q + i);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) lanes[j] = fma(qi, load(keys + j * n + i), lanes[j]);
    }
    return sums(lanes);
}

// out[0 … 8 N) = out · correction + Σ weights[j] · values[j], N vectors in registers.
template <int N>
inline void add_values(const float* weights, int positions, const float* values, int64_t stride, float correction,
                       float* out) {
    vf total[N];
    for (int i = 0; i < N; i++) total[i] = load(out + i * W) * splat(correction);
    for (int j = 0; j < positions; j++) {
        vf w = splat(weights[j]);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) total[i] = fma(w, load(values + j * stride + i * W), total[i]);
    }
    for (int i = 0; i < N; i++) store(out + i * W, total[i]);
}

// Walks over the cached rows of one head, position by position, with one division for all of them.
class Positions {
  public:
    Positions(const AttentionRun& run, int64_t first)
        : run_(run), block_(first / run.block_size), offset_(first % run.block_size) {}
    // Index of the present position's row, in elements; then go on to the next.
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

// Asks for positions that will be read next, a few at a time between other work: all at once they would have to wait for
// each other. Rows of one head are too short and too far apart for the hardware to guess.
class Prefetch {
  public:
    Prefetch(const AttentionRun& run, int64_t first, int64_t count) : run_(run), positions_(run, first), left_(count) {}
    void ask(int64_t count) {
        int64_t bytes = run_.head_dim * (run_.dtype == kFloat32 ? 4 : 2);
        for (; count > 0 && left_ > 0; count--, left_--) {
            int64_t row = positions_.next() * (run_.dtype == kFloat32 ? 4 : 2);
            for (int64_t i = 0; i < bytes; i += 64) {
                __builtin_prefetch((const char*)run_.k_cache + row + i, 0, 3);
                __builtin_prefetch((const char*)run_.v_cache + row + i, 0, 3);
            }
        }
    }

  private:
    const AttentionRun& run_;
    Positions positions_;
    int64_t left_;
};

template <DType D>
inline void load_row(const typename Element<D>::type* from, int64_t n, int64_t padded, float* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, Element<D>::load8(from + i));
    for (; i < n; i++) to[i] = Element<D>::load1(from + i);
    for (; i < padded; i++) to[i] = 0.0f;
}

// `count` positions as float32, the rest of kPositions as zeros.
template <DType D>
void load_positions(const AttentionRun& run, int64_t first, int64_t count, float* keys, float* values) {
    typedef typename Element<D>::type T;
    int64_t n = run.head_dim, padded = run.padded_dim;
    Positions positions(run, first);
    for (int64_t j = 0; j < count; j++) {
        int64_t row = positions.next();
        load_row<D>((const T*)run.k_cache + row, n, padded, keys + j * padded);
        load_row<D>((const T*)run.v_cache + row, n, padded, values + j * padded);
    }
    memset(keys + count * padded, 0, size_t((kPositions - count) * padded) * 4);
    memset(values + count * padded, 0, size_t((kPositions - count) * padded) * 4);
}

// One block of positions, for one query row that sees the first `seen` of them (1 … kPositions).
inline void attend_block(const float* q, const float* keys, const float* values, int64_t n, int64_t seen,
                         SoftmaxState* state, float* out) {
    float scores[kPositions];
    vf largest = splat(-INFINITY);
    for (int64_t j = 0; j < kPositions; j += 8) {
        vf s = dot_eight(q, keys + j * n, n);
        if (j + 8 > seen) {
            for (int64_t i = 0; i < 8; i++) s[i] = j + i < seen ? s[i] : -INFINITY;
        }
        store(scores + j, s);
        largest = vmax(largest, s);  // in this order NaN stays NaN
    }
    float top = max_of(largest);
    float new_max = top > state->max ? top : state->max;
    // Mostly the largest score is an old one, and e^0 is 1.
    float correction = new_max == state->max ? 1.0f : vexp(splat(state->max - new_max))[0];
    vf total = zero();
    for (int64_t j = 0; j < kPositions; j += 8) {
        vf weights = vexp(load(scores + j) - splat(new_max));
        store(scores + j, weights);
        total += weights;
    }
    state->max = new_max;
    state->sum = state->sum * correction + sum(total);
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) add_values<8>(scores, int(seen), values + i, n, correction, out + i);
    for (; i + 16 <= n; i += 16) add_values<2>(scores, int(seen), values + i, n, correction, out + i);
    for (; i < n; i += 8) add_values<1>(scores, int(seen), values + i, n, correction, out + i);
}

// Rows r = query * share + head of run.queries queries; q, out: [rows][padded_dim]; states: [rows].
// Query i sees positions below run.first_limit + i; positions run.begin … run.end − 1 are taken here.
// scratch: 2 * kPositions * padded_dim floats.
void attend_run(const AttentionRun& run, const float* q, SoftmaxState* states, float* out, float* scratch) {
    int64_t n = run.padded_dim, rows = run.queries * run.share;
    float *keys = scratch, *values = scratch + kPositions * n;
    for (int64_t r = 0; r < rows; r++) states[r] = {-INFINITY, 0.0f};
    memset(out, 0, size_t(rows * n) * 4);
    int64_t last = run.first_limit + run.queries - 1;
    int64_t end = run.end < last ? run.end : last;
    for (int64_t first = run.begin; first < end; first += kPositions) {
        int64_t count = end - first < kPositions ? end - first : kPositions;
        int64_t next = first + count, more = end - next < kPositions ? end - next : kPositions;
        if (run.dtype == kFloat32) {
            load_positions<kFloat32>(run, first, count, keys, values);
        } else {
            load_positions<kBFloat16>(run, first, count, keys, values);
        }
        Prefetch ahead(run, next, more);
        for (int64_t i = 0; i < run.queries; i++) {
            int64_t seen = run.first_limit + i - first;
            if (seen <= 0) continue;
            if (seen > count) seen = count;
            for (int64_t r = i * run.share; r < (i + 1) * run.share; r++) {
                ahead.ask((kPositions + rows - 1) / rows);
                attend_block(q + r * n, keys, values, n, seen, &states[r], out + r * n);
            }
        }
    }
}

// Take the state and sums of a later run into those of the earlier ones.
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
