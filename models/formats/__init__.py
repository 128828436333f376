"""File formats that models and adapters read: safetensors, GGUF, and plain reads into memory of our own.

Imports nothing of `models` but its errors. Start with `safetensors.py`.
"""
