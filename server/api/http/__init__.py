"""HTTP itself: the connection's bounds, middleware, keys, bodies, errors, the access log.

Knows no route and no model. Start with `middleware.py`.
"""
