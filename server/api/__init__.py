"""The OpenAI-compatible HTTP API: the application, and the process that listens.

May import `server.engine`, `server.adapters`, `server.metrics` and `server.config`; imports no torch. Start with
`app.py`. `routes/`, `messages/` and `responses/` answer, `generation/` turns requests into generations, `http/` guards
connections.
"""
