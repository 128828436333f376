"""`guanaco chat`: a conversation with a running server in the terminal.

A client of any OpenAI-compatible server. May import `server.commands`, `server.config` and `server.errors`. Start with
`session.py`. `client.py` speaks HTTP, `conversation.py` holds turns and commands, `screen.py` shows Markdown.
"""
