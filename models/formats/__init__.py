"""File formats that models and adapters both read: safetensors, GGUF, JSON; and plain reads, and the hub's errors.

Imports nothing of `models` but its errors. Start with `safetensors.py`.
"""
