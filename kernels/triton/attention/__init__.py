"""Attention over the paged KV cache in Triton.

May import `kernels` and `kernels.triton`. Start with `paged.py`: it chooses the kernel, the tiles and the grid.
"""
