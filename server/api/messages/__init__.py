"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens.

May import `server.api.generation`, `server.api.http` and what they may import. Start with `routes.py`. `protocol` has
the bodies, `translate` turns them into a conversation in chat's shape, `answer` writes the message.
"""
