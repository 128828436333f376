// Which ISAs this build has and this processor can run.
#include "kernels.h"

namespace guanaco {

namespace portable {
extern const Kernels kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kTable;
}
#endif

const Kernels* kernels_of(int32_t isa) {
    switch (isa) {
#if defined(__x86_64__)
        case kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
                       ? &avx2::kTable
                       : nullptr;
#endif
        case kPortable: return &portable::kTable;
        default: return nullptr;
    }
}

}  // namespace guanaco
