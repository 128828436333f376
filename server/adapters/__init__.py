"""Adapters while the server runs, on the event loop: load, prove, publish, replace, roll back, remove.

May import `server.engine`, `server.config`, `adapters`, `models.loading` and `models.formats`; knows nothing of HTTP.
Start with `manager.py`.
"""
