#pragma once
#include "context.h"

namespace guanaco {

// bitsandbytes' packed codes [n * k / 2] and float32 scales [n * k / 64] → tiles (nf4_layout.h), tiles_of(n) *
// tile_bytes(k / 64) bytes. k is a multiple of 64.
void repack_nf4(Context& context, const uint8_t* packed, const float* scales, int64_t n, int64_t k, uint8_t* out);

// `groups` groups of 64 values x in `dtype` → bitsandbytes' packed codes [groups * 32] and scales [groups]. False if a
// value is NaN or infinite.
bool quantize_nf4(Context& context, const void* x, int32_t dtype, int64_t groups, uint8_t* packed, float* scales);

// Rows first … first + count − 1 of a weight of any kind, in `dtype` (float32 or bfloat16): out [count, k].
void decode_rows(Context& context, const Linear& weight, int64_t first, int64_t count, void* out, int32_t dtype);

}  // namespace guanaco
