"""The server's metrics, as Prometheus series.

Imports nothing of the server but the engine's messages and the error codes. Start with `server.py`.
"""
