"""What the server counts, as Prometheus series.

Imports nothing of the server but the engine's messages. Start with `server.py`.
"""
