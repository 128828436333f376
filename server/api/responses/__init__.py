"""OpenAI's Responses API: POST /v1/responses, and the responses that it keeps for a while.

May import `server.api.generation`, `server.api.http` and what they may import. Start with `routes.py`. `protocol` has
the body, `items` turns its items into a conversation in chat's shape, `answer` writes the response, and `store` keeps
it.
"""
