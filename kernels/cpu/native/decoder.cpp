// All decoder layers in one call: what models/architectures/decoder.py composes from small ops, without Python in
// between.
#include "decoder.h"

#include "linear.h"
#include "sequence_ops.h"

namespace guanaco {
namespace {

constexpr int kModules = 7;  // q, k, v, o, gate, up, down: PROJECTIONS in kernels/ops.py, the order of LoRA modules

class Decoder {
  public:
    Decoder(Context& context, const Model& model, const Batch& batch, const Lora* lora, float* x)
        : context_(context), kernels_(*context.kernels), model_(model), batch_(batch), lora_(lora), x_(x),
          tokens_(batch.num_tokens), heads_{model.heads, model.kv_heads, model.head_dim} {
        int64_t q_size = int64_t(model.heads) * model.head_dim, kv_size = int64_t(model.kv_heads) * model.head_dim;
        q_ = context.arena.take<float>(tokens_ * q_size);
        k_ = context.arena.take<float>(tokens_ * kv_size);
        v_ = context.arena.take<float>(tokens_ * kv_size);
        normed_ = context.arena.take<float>(tokens_ * model.hidden);
        inner_ = context.arena.take<float>(tokens_ * model.intermediate);
        normed_activations_ = activations(context, normed_, tokens_, model.hidden);
        mixed_activations_ = activations(context, q_, tokens_, q_size);
        inner_activations_ = activations(context, inner_, tokens_, model.intermediate);
    }

    void layer(int index, const Cache& cache) {
        const Layer& l = model_.layers[index];
        int first = index * kModules;
        int64_t q_size = int64_t(model_.heads) * model_.head_dim, kv_size = int64_t(model_.kv_heads) * model_.head_dim;

        norm(l.input_norm);
        const int qkv[] = {first, first + 1, first + 2};
        shrink(context_, lora_, qkv, 3, normed_, model_.hidden, deltas_);
        const Product inputs[] = {{&l.q, &deltas_[0], q_, q_size},
                                  {&l.k, &deltas_[1], k_, kv_size},
                                  {&l.v, &deltas_[2], v_, kv_size}};
        multiply(context_, normed_activations_, inputs, 3);
        if (l.q_norm != nullptr || l.k_norm != nullptr) norm_heads(l);
        rope_and_cache(context_, heads_, batch_, cache, q_, k_, v_);
        attention(context_, heads_, batch_, cache, model_.attention_scale, q_, q_);
        add_product(l.o, first + 3, mixed_activations_);

        norm(l.post_norm);
        const int gate_up[] = {first + 4, first + 5};
        shrink(context_, lora_, gate_up, 2, normed_, model_.hidden, deltas_);
        const Product swiglu{&l.gate,          &deltas_[0], inner_,     model_.intermediate,
                             Product::kSwiGlu, &l.up,       &deltas_[1]};
        multiply(context_, normed_activations_, &swiglu, 1);
        add_product(l.down, first + 6, inner_activations_);
    }

  private:
    void norm(const float* weight) {
        context_.pool.each(tokens_, [&](int64_t t, int) {
            kernels_.rms_norm(x_ + t * model_.hidden, weight, model_.hidden, model_.eps, normed_ + t * model_.hidden);
            quantize_row(context_, normed_activations_, t);
        });
    }

    // Each head of q and k, in place, where the layer has a norm of it.
    void norm_heads(const Layer& l) {
        context_.pool.each(tokens_, [&](int64_t t, int) {
            if (l.q_norm != nullptr) norm_row(q_ + t * heads_.heads * heads_.head_dim, heads_.heads, l.q_norm);
            if (l.k_norm != nullptr) norm_row(k_ + t * heads_.kv_heads * heads_.head_dim, heads_.kv_heads, l.k_norm);
        });
    }

    void norm_row(float* row, int64_t heads, const float* weight) {
        for (int64_t h = 0; h < heads; h++) {
            float* head = row + h * heads_.head_dim;
            kernels_.rms_norm(head, weight, heads_.head_dim, model_.eps, head);
        }
    }

    // x += W a, with LoRA.
    void add_product(const Linear& w, int module, const Activations& a) {
        quantize(context_, a);
        shrink(context_, lora_, &module, 1, a.x, a.k, deltas_);
        const Product product{&w, &deltas_[0], x_, model_.hidden, Product::kAdd};
        multiply(context_, a, &product, 1);
    }

    Context& context_;
    const Kernels& kernels_;
    const Model& model_;
    const Batch& batch_;
    const Lora* lora_;
    float* x_;
    int64_t tokens_;
    Heads heads_;
    float *q_, *k_, *v_, *normed_, *inner_;
    Activations normed_activations_, mixed_activations_, inner_activations_;
    LoraDelta deltas_[3];
};

}  // namespace

void decode_layers(Context& context, const Model& model, const Batch& batch, const Cache* caches, const Lora* lora,
                   float* x) {
    Decoder decoder(context, model, batch, lora, x);
    for (int i = 0; i < model.num_layers; i++) {
        Arena::Mark mark = context.arena.mark();
        decoder.layer(i, caches[i]);
        context.arena.rewind(mark);
    }
}

}  // namespace guanaco
