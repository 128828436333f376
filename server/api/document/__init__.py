"""The parts of /openapi.json besides the bodies: examples, answers, errors, streams and keys of every route.

Plain data, and one function that completes FastAPI's document. Imports only paths, from `server.api.http`.
Start at `describe.describe`.
"""
