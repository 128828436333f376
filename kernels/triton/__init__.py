"""The `triton` provider: kernels for NVIDIA GPUs that never ran on a GPU; tests run them in Triton's interpreter.

May import `kernels` and Triton, never `kernels.analysis`. Start with `ops.py` (one method an op), then `layers.py` (all
decoder layers). `products/` multiplies NF4 weights, `attention/` reads the paged KV cache.
"""
