// AVX-512 with VNNI: Cascade Lake (2019), Zen 4 (2022) and later.
#if defined(__x86_64__)
#if !defined(GUANACO_EMULATE_AVX512)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define GUANACO_HAS_AVX2 1
#define GUANACO_HAS_VNNI 1
#endif
#define GUANACO_ISA avx512vnni
#define GUANACO_ISA_NAME "avx512vnni"
#include "simd.h"

#include "nf4_avx512.h"
namespace guanaco {
namespace GUANACO_ISA {
constexpr int kFewRows = 16;
constexpr int kDirectRows = 12;
constexpr int kMaxRows = 12;  // a sum each, levels and an activation: well within 32 registers
constexpr int kSideBySideRows = 5;
constexpr int64_t kPrefetchBytes = 16384;  // about a tile; 4096 cost 16 rows 5 % on Zen 4
constexpr int kDirectLanes = 6, kKeepLanes = 5, kMostLanes = 6;
}
}  // namespace guanaco
#include "isa_table.h"
#endif
