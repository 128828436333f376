"""Converts adapters in older formats (pickles, float32, old keys) to the format that the server reads.

A restricted process parses pickles without executing them. Start with `conversion.py`.
"""
