"""What models and adapters both read: safetensors, GGUF, JSON, plain reads into memory of our own, the hub's errors.

Imports nothing of `models` but its errors. Start with `safetensors.py`.
"""
