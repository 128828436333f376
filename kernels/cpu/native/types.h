// The operands that cross the C interface: plain structs, mirrored field by field in kernels/cpu/library.py.
// All pointers must be valid during a call only; all sizes are in elements unless a name says bytes.
#pragma once
#include <stdint.h>

namespace guanaco {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum WeightKind : int32_t {
    kNf4Tiled = 0,  // repacked for this CPU: tiles of 16 rows, see nf4_layout.h
    kNf4Flat = 1,   // bitsandbytes' own order: for rows that are not a multiple of 64, so that groups cross rows
    kDense = 2,     // row-major [n, k] in `dtype`
};

struct Linear {
    int64_t n, k;  // out, in
    int32_t kind;  // WeightKind
    int32_t dtype;  // of a dense weight
    const uint8_t* data;  // tiles, packed codes, or the dense matrix
    const float* bias;  // [n] or null
    // Scales of kNf4Flat, float32 [ceil(n * k / 64)]; those of kNf4Tiled are in the tiles.
    const float* scales;
};

// One module of one adapter. a: [rank, in], b: [out, rank], both row-major in `dtype`.
struct LoraPair {
    const void* a;  // null: the adapter does not change this module
    const void* b;
    int32_t rank;
    int32_t dtype;
    float scale;
    int32_t unused;
};

// Rows that have adapters, as (row, slot, scale) entries sorted by slot, then row. A slot here is a column of `pairs`:
// it counts the adapters of the batch.
struct Lora {
    const int32_t* rows;  // [entries]
    const int32_t* slots;  // [entries]
    const float* scales;  // [entries]
    const LoraPair* pairs;  // [modules][num_slots]: this product's module alone, or all modules of the model
    int32_t num_entries;
    int32_t num_slots;
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const float* input_norm;  // [hidden]
    const float* post_norm;  // [hidden]
    const float* q_norm;  // [head_dim], of each head before the rotation; null: heads stay as they are
    const float* k_norm;
};

struct Model {
    const Layer* layers;
    int32_t num_layers;
    int32_t hidden, heads, kv_heads, head_dim, intermediate;
    float eps;
    float attention_scale;
};

// The paged cache of one layer: [blocks, block_size, kv_heads, head_dim] each.
struct Cache {
    void* k;
    void* v;
};

struct Batch {
    int64_t num_tokens;
    int64_t num_sequences;
    int64_t table_stride;  // blocks per row of block_tables
    const int64_t* slot_mapping;  // [tokens], -1 writes nothing
    const int32_t* block_tables;  // [sequences, table_stride]
    const int32_t* context_lens;  // [sequences]
    const int32_t* cu_seqlens_q;  // [sequences + 1]
    const float* cos;  // [tokens, head_dim / 2]
    const float* sin;
    int32_t block_size;
    int32_t cache_dtype;
};

// How one token is sampled. A temperature of 0 or less takes the largest logit; top_k 0, top_p 1, min_p 0 filter
// nothing.
struct Draw {
    double uniform;  // in [0, 1)
    float temperature, top_p, min_p;
    int32_t top_k;
};

}  // namespace guanaco
