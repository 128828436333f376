// The table of functions that every ISA provides; chosen once, when a context is made. The functions know rows, tiles
// and runs of positions, but no threads, layers or sequences.
#pragma once
#include <stdint.h>

#include "nf4_layout.h"
#include "types.h"

namespace guanaco {

constexpr int64_t kPositions = 32;  // cached positions that attention computes together: 16 KB of float32 at 64 dimensions
constexpr int64_t kSplit = 512;  // positions after which a run of attention ends; a multiple of kPositions

// One run of cached positions for some queries of one sequence and some neighbouring key-value heads.
struct AttentionRun {
    const void* k_cache;
    const void* v_cache;
    const int32_t* block_table;
    int64_t block_size, kv_heads, kv_head, num_heads, head_dim;  // heads kv_head … kv_head + num_heads − 1 of kv_heads
    int64_t padded_dim;  // head_dim rounded up to 8
    int64_t queries, share;  // share: query heads of one key-value head; rows = num_heads * queries * share
    int64_t first_limit;  // positions that the first query sees; each later one sees one more
    int64_t begin, end;  // the run
    int32_t dtype;
};

struct SoftmaxState {
    float max, sum;
};

struct Kernels {
    const char* name;
    int32_t layout;  // nf4_layout.h

    void (*quantize_row)(const float* x, int64_t groups, int64_t stride, int16_t* integers, float* factors);
    void (*nf4_tiles)(const uint8_t* tile, int64_t count, int64_t groups, const int16_t* x, const float* factors,
                      int64_t stride, int64_t rows, float* y);
    void (*dense_tile)(const void* w, int32_t dtype, int64_t n, int64_t k, const float* const* x, int64_t rows,
                       float* y, int64_t stride);
    void (*add_row)(const void* w, int32_t dtype, int64_t n, int64_t k, const float* x, float scale, float* y);
    // Rows first … first + rows − 1 of a tile in float32, `stride` apart.
    void (*decode_tile)(const uint8_t* tile, int64_t groups, int64_t first, int64_t rows, float* out, int64_t stride);
    void (*decode_flat)(const uint8_t* packed, const float* scales, int64_t first, int64_t count, float* out);
    void (*to_float)(const void* x, int32_t dtype, int64_t n, float* out);
    void (*from_float)(const float* x, int64_t n, void* out, int32_t dtype);
    void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
    void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);
    void (*rotate)(const float* x, const float* cos, const float* sin, int64_t half, float* out);
    void (*add)(const float* x, int64_t n, float* to);
    void (*exp_row)(const float* x, int64_t n, float largest, float temperature, float* out);
    void (*attend_run)(const AttentionRun& run, const float* q, SoftmaxState* states, float* out, float* scratch);
    void (*merge_runs)(int64_t rows, int64_t n, const SoftmaxState* later, const float* later_out,
                       SoftmaxState* states, float* out);
    bool (*encode_groups)(const void* x, int32_t dtype, int64_t first, int64_t count, uint8_t* packed, float* scales);
};

// The ISAs in order of preference, the best first; the last one runs anywhere.
// CPU_ISAS in kernels/ops.py names them in this order.
enum Isa : int32_t { kAvx512Vnni = 0, kAvx512 = 1, kAvx2 = 2, kPortable = 3 };

// The table of an ISA; null if this processor or this build does not have it.
const Kernels* kernels_of(int32_t isa);

}  // namespace guanaco
