"""The `cpu` provider: C++ kernels for x86 processors (`native/`), loaded through ctypes.

May import `kernels` only, never `kernels.triton` or `kernels.analysis`. Start with `ops.py`: every op checks its shapes
and calls one native function.
"""
