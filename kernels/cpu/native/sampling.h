// Picking tokens from rows of logits.
#pragma once
#include "context.h"
#include "types.h"

namespace guanaco {

// out[r] = the sampled token of row r of logits [rows, vocab], vocab >= 1; -infinity forbids a token. For any numbers
// (NaN, infinities, filters that keep nothing), out[r] is in [0, vocab): if no token can be sampled, the largest one.
void draw(Context& context, const float* logits, int64_t rows, int64_t vocab, const Draw* draws, int64_t* out);

}  // namespace guanaco
