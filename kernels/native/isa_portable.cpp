// Any processor: what the compiler's own baseline allows.
#define GUANACO_ISA portable
#define GUANACO_ISA_NAME "portable"
#include "simd.h"

#include "nf4_portable.h"
namespace guanaco {
namespace GUANACO_ISA {
constexpr int kMaxRows = 6;
constexpr int kDirectRows = 4;
}  // namespace GUANACO_ISA
}  // namespace guanaco
#include "attention.h"
#include "dense.h"
#include "elementwise.h"
#include "nf4_tile.h"

#include "isa_table.h"

namespace guanaco {
namespace GUANACO_ISA {
extern const Kernels kTable = GUANACO_TABLE;
}
}  // namespace guanaco
