"""What /openapi.json says besides the bodies: examples, answers, errors, streams and keys of every route.

Pure data and one function over FastAPI's document. Imports paths from `server.api.http`, and nothing that serves.
Start at `describe.describe`.
"""
