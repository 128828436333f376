"""`guanaco bench`: one file for each thing that is measured. The options are in `commands/main.py`.

May import everything. Start with `engine.py`; `kernels.py` needs Triton, and `kernels_gpu.py` a GPU.
"""
