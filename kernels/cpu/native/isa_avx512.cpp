// AVX-512 without VNNI: Skylake-X (2017).
#if defined(__x86_64__)
#if !defined(GUANACO_EMULATE_AVX512)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define GUANACO_HAS_AVX2 1
#endif
#define GUANACO_ISA avx512
#define GUANACO_ISA_NAME "avx512"
#include "simd.h"

#include "nf4_avx512.h"
namespace guanaco {
namespace GUANACO_ISA {
constexpr int kFewRows = 8;
constexpr int kDirectRows = 6;
constexpr int kMaxRows = 6;  // more, and GCC keeps some of the sums in memory
constexpr int kSideBySideRows = 3;  // four cost 7 % more side by side, five 24 %
constexpr int64_t kPrefetchBytes = 16384;
constexpr int kDirectLanes = 6, kKeepLanes = 5, kMostLanes = 6;
}
}  // namespace guanaco
#include "isa_table.h"
#endif
