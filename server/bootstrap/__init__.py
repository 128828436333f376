"""Turns settings into a loaded model with an engine: devices, memory plan, kernels, adapters.

May import `server.engine`, `server.config`, `server.errors`, `models`, `adapters` and `kernels`, and `training.py` may
import `server.training`; knows nothing of HTTP. Start with `runtime.py`.
"""
