// The C interface that kernels/cpu/library.py loads. guanaco_create returns null if it fails. Every other function that
// can fail returns 0, or -1 if memory ran out.
#include <stdint.h>

#include <exception>
#include <new>

#include "context.h"
#include "decoder.h"
#include "linear.h"
#include "repack.h"
#include "sampling.h"
#include "sequence_ops.h"

using namespace guanaco;

namespace {

// Runs one call on a context. Calls wait for each other, and each begins with an empty arena.
template <class F>
int32_t guarded(Context* context, F&& f) {
    try {
        std::lock_guard<std::mutex> lock(context->mutex);
        context->arena.reset();
        f(*context);
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

// Rows of activations as float32: the rows themselves, or a converted copy.
const float* floats(Context& context, const void* x, int32_t dtype, int64_t rows, int64_t columns) {
    if (dtype == kFloat32) return static_cast<const float*>(x);
    float* out = context.arena.take<float>(rows * columns);
    context.pool.each(rows, [&](int64_t r, int) {
        context.kernels->to_float((const uint16_t*)x + r * columns, dtype, columns, out + r * columns);
    });
    return out;
}

// Memory for an op's float32 results: the output itself, or memory from which deliver() rounds them.
float* results(Context& context, void* y, int32_t dtype, int64_t rows, int64_t columns) {
    return dtype == kFloat32 ? static_cast<float*>(y) : context.arena.take<float>(rows * columns);
}

void deliver(Context& context, const float* from, void* y, int32_t dtype, int64_t rows, int64_t columns) {
    if (dtype == kFloat32) return;
    context.pool.each(rows, [&](int64_t r, int) {
        context.kernels->from_float(from + r * columns, columns, (uint16_t*)y + r * columns, dtype);
    });
}

}  // namespace

extern "C" {

// The ISA's name; null if this processor does not have it.
const char* guanaco_isa_name(int32_t isa) {
    const Kernels* k = kernels_of(isa);
    return k == nullptr ? nullptr : k->name;
}

// Sizes of the structs in bytes, which the mirror in Python compares with its own.
void guanaco_struct_bytes(int32_t* out) {
    const size_t sizes[] = {sizeof(Linear), sizeof(LoraPair), sizeof(Lora),  sizeof(Layer),
                            sizeof(Model),  sizeof(Cache),    sizeof(Batch), sizeof(Draw)};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) out[i] = int32_t(sizes[i]);
}

// team: GOMP_parallel of a library whose threads are to be used, or null for own threads.
Context* guanaco_create(int32_t isa, int32_t num_threads, ThreadPool::Team team) {
    const Kernels* k = kernels_of(isa);
    if (k == nullptr) return nullptr;
    try {
        return new Context(k, num_threads, team);
    } catch (const std::exception&) {  // out of memory or threads
        return nullptr;
    }
}

void guanaco_destroy(Context* context) { delete context; }

int64_t guanaco_nf4_bytes(int64_t n, int64_t k) { return tiles_of(n) * tile_bytes(k / kGroup); }

int32_t guanaco_nf4_layout(Context* context) { return context->kernels->layout; }

int32_t guanaco_nf4_repack(Context* context, const uint8_t* packed, const float* scales, int64_t n, int64_t k,
                           uint8_t* out) {
    return guarded(context, [&](Context& c) { repack_nf4(c, packed, scales, n, k, out); });
}

// finite: set to 1, or to 0 if a value is NaN or infinite; then the other results mean nothing.
int32_t guanaco_nf4_quantize(Context* context, const void* x, int32_t dtype, int64_t groups, uint8_t* packed,
                             float* scales, int32_t* finite) {
    return guarded(context, [&](Context& c) { *finite = quantize_nf4(c, x, dtype, groups, packed, scales); });
}

// out [count, k] in `dtype`: rows first … first + count − 1 of the weight.
int32_t guanaco_decode_rows(Context* context, const Linear* weight, int64_t first, int64_t count, void* out,
                            int32_t dtype) {
    return guarded(context, [&](Context& c) { decode_rows(c, *weight, first, count, out, dtype); });
}

// y [rows, n] = x [rows, k] · Wᵀ + bias + LoRA; x in x_dtype, y in y_dtype.
int32_t guanaco_linear(Context* context, const Linear* weight, const Lora* lora, const void* x, int32_t x_dtype,
                       int64_t rows, void* y, int32_t y_dtype) {
    return guarded(context, [&](Context& c) {
        Activations a = activations(c, floats(c, x, x_dtype, rows, weight->k), rows, weight->k);
        if (weight->kind == kNf4Tiled) quantize(c, a);
        LoraDelta delta;
        const int module = 0;
        shrink(c, lora, &module, 1, a.x, a.k, &delta);
        float* out = results(c, y, y_dtype, rows, weight->n);
        const Product product{weight, &delta, out, weight->n};
        multiply(c, a, &product, 1);
        deliver(c, out, y, y_dtype, rows, weight->n);
    });
}

int32_t guanaco_rms_norm(Context* context, const void* x, int32_t x_dtype, const float* weight, float eps,
                         int64_t rows, int64_t columns, void* y, int32_t y_dtype) {
    return guarded(context, [&](Context& c) {
        const float* in = floats(c, x, x_dtype, rows, columns);
        float* out = results(c, y, y_dtype, rows, columns);
        c.pool.each(rows, [&](int64_t r, int) {
            c.kernels->rms_norm(in + r * columns, weight, columns, eps, out + r * columns);
        });
        deliver(c, out, y, y_dtype, rows, columns);
    });
}

int32_t guanaco_silu_mul(Context* context, const void* gate, const void* up, int32_t x_dtype, int64_t rows,
                         int64_t columns, void* y, int32_t y_dtype) {
    return guarded(context, [&](Context& c) {
        const float* g = floats(c, gate, x_dtype, rows, columns);
        const float* u = floats(c, up, x_dtype, rows, columns);
        float* out = results(c, y, y_dtype, rows, columns);
        c.pool.each(rows, [&](int64_t r, int) {
            c.kernels->silu_mul(g + r * columns, u + r * columns, columns, out + r * columns);
        });
        deliver(c, out, y, y_dtype, rows, columns);
    });
}

// q, k, v and the rotated q in q_out are in `dtype`.
int32_t guanaco_rope_and_cache(Context* context, const Batch* batch, const Cache* cache, int64_t heads,
                               int64_t kv_heads, int64_t head_dim, const void* q, const void* k, const void* v,
                               int32_t dtype, void* q_out) {
    return guarded(context, [&](Context& c) {
        int64_t t = batch->num_tokens, q_size = heads * head_dim, kv_size = kv_heads * head_dim;
        float* rotated = results(c, q_out, dtype, t, q_size);
        c.kernels->to_float(q, dtype, t * q_size, rotated);
        rope_and_cache(c, {heads, kv_heads, head_dim}, *batch, *cache, rotated, floats(c, k, dtype, t, kv_size),
                       floats(c, v, dtype, t, kv_size));
        deliver(c, rotated, q_out, dtype, t, q_size);
    });
}

int32_t guanaco_attention(Context* context, const Batch* batch, const Cache* cache, int64_t heads, int64_t kv_heads,
                          int64_t head_dim, float scale, const void* q, int32_t dtype, void* out) {
    return guarded(context, [&](Context& c) {
        int64_t t = batch->num_tokens, q_size = heads * head_dim;
        float* mixed = results(c, out, dtype, t, q_size);
        attention(c, {heads, kv_heads, head_dim}, *batch, *cache, scale, floats(c, q, dtype, t, q_size), mixed);
        deliver(c, mixed, out, dtype, t, q_size);
    });
}

// out[r] = the sampled token of row r of float32 logits [rows, vocab].
int32_t guanaco_draw(Context* context, const float* logits, int64_t rows, int64_t vocab, const Draw* draws,
                     int64_t* out) {
    return guarded(context, [&](Context& c) { draw(c, logits, rows, vocab, draws, out); });
}

// All layers: x [tokens, hidden] in x_dtype → y in y_dtype.
int32_t guanaco_decode(Context* context, const Model* model, const Batch* batch, const Cache* caches,
                       const Lora* lora, const void* x, int32_t x_dtype, void* y, int32_t y_dtype) {
    return guarded(context, [&](Context& c) {
        int64_t t = batch->num_tokens;
        float* out = results(c, y, y_dtype, t, model->hidden);
        c.kernels->to_float(x, x_dtype, t * model->hidden, out);
        decode_layers(c, *model, *batch, caches, lora, out);
        deliver(c, out, y, y_dtype, t, model->hidden);
    });
}

}  // extern "C"
