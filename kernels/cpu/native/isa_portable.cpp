// Any processor: only the compiler's baseline instructions.
#define GUANACO_ISA portable
#define GUANACO_ISA_NAME "portable"
#include "simd.h"

#include "nf4_portable.h"
#include "nf4_byte_order.h"
namespace guanaco {
namespace GUANACO_ISA {
constexpr int kFewRows = 4;
constexpr int kDirectRows = 4;
constexpr int kMaxRows = 6;
constexpr int kSideBySideRows = 1;
constexpr int64_t kPrefetchBytes = 4096;
constexpr int kDirectLanes = 2, kKeepLanes = 2, kMostLanes = 3;
}  // namespace GUANACO_ISA
}  // namespace guanaco
#include "isa_table.h"
