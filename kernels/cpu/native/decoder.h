#pragma once
#include "context.h"
#include "types.h"

namespace guanaco {

// x [tokens, hidden], in place, through all layers. lora.pairs: [num_layers * 7][num_slots]; null: no adapters.
void decode_layers(Context& context, const Model& model, const Batch& batch, const Cache* caches, const Lora* lora,
                   float* x);

}  // namespace guanaco
