"""PEFT's adapter format: configuration and weights, checked in full before anything is used.

May import `adapters.errors`, `kernels` and `models.formats`. Start with `weights.py`.
"""
