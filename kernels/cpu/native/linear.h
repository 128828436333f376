// Linear layers for many rows and threads: quantised activations, LoRA, and products whose results are stored, added to
// a residual, or combined to SwiGLU.
#pragma once
#include "context.h"
#include "types.h"

namespace guanaco {

// Rows of float32 activations; after quantize() also as integers.
struct Activations {
    const float* x;  // [rows, k]
    int64_t rows, k;
    int16_t* integers;  // [groups][rows][64], or null where k is no multiple of 64
    float* factors;  // [groups][rows]
};

Activations activations(Context& context, const float* x, int64_t rows, int64_t k);
// Compute the integers of one row.
void quantize_row(const Context& context, const Activations& a, int64_t row);
// Compute the integers of all rows, on all threads.
void quantize(Context& context, const Activations& a);

// The LoRA operand of one module, after its shrink.
struct LoraDelta {
    struct Segment {  // entries of one adapter slot
        const LoraPair* pair;
        int32_t first, last;  // entries, sorted by row
        float* t;  // [last - first][rank]: A x
    };
    std::vector<Segment> segments;
    const Lora* lora = nullptr;
};

// t = A x for `count` modules that read the same x; modules[i] is a row of lora.pairs. `lora` null: no deltas.
void shrink(Context& context, const Lora* lora, const int* modules, int count, const float* x, int64_t k,
            LoraDelta* deltas);

struct Product {
    enum Result { kStore, kAdd, kSwiGlu };
    const Linear* weight;
    const LoraDelta* delta;  // may be without segments
    float* y;  // [rows, stride]
    int64_t stride;
    Result result = kStore;
    // kSwiGlu: y = SiLU(this product) * that of `up`
    const Linear* up = nullptr;
    const LoraDelta* up_delta = nullptr;
};

// Compute all products of the same activations. Their tiles are distributed over the threads.
void multiply(Context& context, const Activations& x, const Product* products, int count);

}  // namespace guanaco
