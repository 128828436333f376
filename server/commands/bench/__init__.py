"""`guanaco bench`: one file for each thing that is measured, and `serving/` for the load on a running server.

The options are in `commands/main.py`, those of `bench serve` in `serving/options.py`. May import everything. Start with
`engine.py`; `kernels.py` needs Triton, and `kernels_gpu.py` a GPU.
"""
