"""PEFT's adapter format: configuration and weights. Everything is checked before anything is used.

May import `adapters.errors`, `kernels` and `models.formats`. Start with `weights.py`.
"""
