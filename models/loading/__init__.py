"""From what an operator names to weights in memory: download, open, quantise, repack, cache.

May import all of `models` and `kernels`. Start with `loader.py`.
"""
