"""Adapters in older formats (pickles, float32, old keys) converted to what the server reads.

Pickles are taken apart here, in a restricted process, and are never executed. Start with `conversion.py`.
"""
