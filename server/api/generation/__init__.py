"""From the body of a request to generations of the engine, and from their outputs to an answer.

May import `server.api.http`, `server.engine`, `server.adapters`, `server.metrics` and `server.config`. Start with
`serving.py`.
"""
