// The two ops that know sequences and the paged cache: rotary embedding with the cache write, and attention.
#pragma once
#include "context.h"
#include "types.h"

namespace guanaco {

struct Heads {
    int64_t heads, kv_heads, head_dim;
};

// Rotate q in place [tokens, heads, head_dim]; rotate k, and write k and v [tokens, kv_heads, head_dim] to the cache.
void rope_and_cache(Context& context, const Heads& heads, const Batch& batch, const Cache& cache, float* q,
                    const float* k, const float* v);

// q, out: [tokens, heads, head_dim]. `out` may be q.
void attention(Context& context, const Heads& heads, const Batch& batch, const Cache& cache, float scale,
               const float* q, float* out);

}  // namespace guanaco
