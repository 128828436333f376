"""What a model computes: configuration, layers, the forward pass, and the storage of its KV cache.

May import `kernels` and `models.errors`. Start with `decoder.py`; `registry.py` has the architectures.
"""
