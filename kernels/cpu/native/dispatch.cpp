// Which ISAs this build has and this processor can run.
// A build with GUANACO_EMULATE_AVX512 is for tests: its AVX-512 tables use plain vectors and run on any processor; it
// has no AVX2 table.
#include "kernels.h"

namespace guanaco {

namespace portable {
extern const Kernels kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512vnni {
extern const Kernels kTable;
}

#if defined(GUANACO_EMULATE_AVX512)
static bool has_avx512() { return true; }
static bool has_vnni() { return true; }
#else
static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif
#endif

const Kernels* kernels_of(int32_t isa) {
    switch (isa) {
#if defined(__x86_64__)
        case kAvx512Vnni: return has_vnni() ? &avx512vnni::kTable : nullptr;
        case kAvx512: return has_avx512() ? &avx512::kTable : nullptr;
#if !defined(GUANACO_EMULATE_AVX512)
        case kAvx2: return has_avx2() ? &avx2::kTable : nullptr;
#endif
#endif
        case kPortable: return &portable::kTable;
        default: return nullptr;
    }
}

}  // namespace guanaco
