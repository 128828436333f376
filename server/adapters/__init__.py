"""Adapters while the server runs, on the event loop: load, prove, publish, replace, roll back, remove.

May import `server.engine`, `server.config` and `adapters`; knows nothing of HTTP. Start with `manager.py`.
"""
