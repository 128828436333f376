"""`guanaco bench serve`: a load on a running server, at a rate that does not wait for answers (an open loop).

`options.py` has the command's options and `run.py` runs it. `plan.py` checks the options and makes a run's requests:
`arrivals.py` computes when each is due, and `prompts.py` makes its prompt. `runner.py` sends them through `client.py`.
`metrics.py` computes the result; `tables.py` and `report.py` show it. This room knows a server only by OpenAI's
protocol, so it imports nothing of the engine, the models or the adapters. May import `server.judging.prompts`,
`server.reports`, `server.commands.common`, `server.errors` and `server.config`. Start with `run.py`.
"""
