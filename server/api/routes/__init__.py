"""The routes, one file for each subject.

May import `server.api.generation`, `server.api.http` and what they may import. Start with `chat.py`.
"""
