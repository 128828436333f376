// AVX2 with FMA and F16C: Haswell (2013), Zen (2017) and later.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define GUANACO_ISA avx2
// For the headers: up to GCC 12, g++ does not define __AVX2__ and the like after the pragma.
#define GUANACO_HAS_AVX2 1
#define GUANACO_ISA_NAME "avx2"
#include "simd.h"

#include "nf4_avx2.h"
#include "nf4_byte_order.h"
namespace guanaco {
namespace GUANACO_ISA {
constexpr int kFewRows = 4;
constexpr int kDirectRows = 4;
constexpr int kMaxRows = 6;  // 12 sums, 2 levels and an activation fit the 16 registers
constexpr int kSideBySideRows = 1;
constexpr int64_t kPrefetchBytes = 4096;  // about a microsecond of streaming
constexpr int kDirectLanes = 2, kKeepLanes = 2, kMostLanes = 3;
}
}  // namespace guanaco
#include "isa_table.h"
#endif
