"""The engine: schedule, run, sample. One thread drives it.

May import `models`, `adapters`, `kernels` and `server.config`; knows nothing of HTTP, hubs or files. Start with
`engine.py`: read its `Engine.step` first.
"""
