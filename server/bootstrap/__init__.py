"""Turns settings into a loaded model with an engine: devices, memory plan, kernels, adapters.

May import `server.engine`, `server.config`, `models`, `adapters` and `kernels`; knows nothing of HTTP. Start with
`runtime.py`.
"""
