// Any processor: what the compiler's own baseline allows.
#define GUANACO_ISA portable
#define GUANACO_ISA_NAME "portable"
#include "simd.h"

#include "nf4_portable.h"
namespace guanaco {
namespace GUANACO_ISA {
constexpr int kMaxRows = 6;
constexpr int kDirectRows = 4;
constexpr bool kManyLanes = false;
}  // namespace GUANACO_ISA
}  // namespace guanaco
#include "isa_table.h"
