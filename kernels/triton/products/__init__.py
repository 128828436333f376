"""Products of NF4 weights and of LoRA matrices in Triton: one file for each range of row counts.

May import `kernels` and `kernels.triton`. Start with `operands.py`: the operands that every product kernel takes.
"""
