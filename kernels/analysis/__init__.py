"""Compiles Triton kernels for GPUs that this machine doesn't have, and counts what their machine code costs.

A development tool: `guanaco bench kernels` and the tests use it, the running server never imports it. Start with
`compile.py`.
"""
