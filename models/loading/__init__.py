"""Loads a model by its name or path: download, open, quantise, repack, cache.

May import all of `models` and `kernels`. Start with `loader.py`.
"""
