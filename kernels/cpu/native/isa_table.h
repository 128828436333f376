// The last include of each isa_*.cpp: compiles all code that exists once per ISA, on top of the core that the file has
// chosen, and makes the ISA's table of functions.
#include "attention.h"
#include "dense.h"
#include "elementwise.h"
#include "nf4_encode.h"
#include "nf4_tile.h"

namespace guanaco {
namespace GUANACO_ISA {
extern const Kernels kTable = {GUANACO_ISA_NAME, kLayout,    quantize_row, nf4_tiles, dense_tile, add_row, decode_tile, decode_flat,
                               to_float,         from_float, rms_norm,     silu_mul,  rotate,     add,     exp_row,
                               attend_run,       merge_runs, encode_groups};
}
}  // namespace guanaco
