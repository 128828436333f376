// Picking tokens from rows of logits.
#pragma once
#include "context.h"
#include "types.h"

namespace guanaco {

// out[r] = the token of row r of logits [rows, vocab]; which may hold -infinity (a token that is forbidden), but not in
// every place, and no NaN.
void draw(Context& context, const float* logits, int64_t rows, int64_t vocab, const Draw* draws, int64_t* out);

}  // namespace guanaco
