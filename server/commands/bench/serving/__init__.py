"""`guanaco bench serve`: a load on a running server, at a rate that does not wait for answers (an open loop).

`options.py` has the command's options and `run.py` runs it. A run is `arrivals.py` (when each request is due),
`prompts.py` (what it asks), `runner.py` over `client.py` (the requests), `metrics.py` (the result), `tables.py` and
`report.py` (what a reader sees). It knows a server only by OpenAI's protocol, so it imports nothing of the engine, the
models or the adapters. May import `server.judging.prompts`, `server.reports`, `server.commands.common`, `server.errors`
and `server.config`. Start with `run.py`.
"""
