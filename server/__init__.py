"""The server: command line, HTTP API, engine, and the life cycle of adapters.

May import everything below: `kernels`, `models`, `adapters`. Start with `commands/serve.py`, then `engine/engine.py`.
"""
