"""Names and immutable versions of adapters: registry, private copies on disk, aliases, profiles.

May import `adapters.peft` and `adapters.errors`. Start with `registry.py`.
"""
