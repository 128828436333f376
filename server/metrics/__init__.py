"""The server's metrics, as Prometheus series.

May import `server.engine.request`, `server.engine.speculation` and `models.error_codes`, and nothing else of ours.
Start with `server.py`.
"""
