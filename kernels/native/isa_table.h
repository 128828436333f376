// Last include of an isa_*.cpp: the table of what the headers before it defined.
#define GUANACO_TABLE                                                                                              \
    {GUANACO_ISA_NAME, kLayout, quantize_row, nf4_tile, dense_tile, decode_flat, to_float, from_float, rms_norm, \
     silu_mul, rotate, add, exp_row, attend_run, merge_runs}
