"""Turns a request's body into generations of the engine, and their outputs into an answer.

May import `server.api.http`, `server.engine`, `server.adapters`, `server.metrics` and `server.config`. Start with
`serving.py`.
"""
