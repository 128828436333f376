"""Which of several adapters is better, and how sure that is: answers side by side, judges, statistics, reports.

`guanaco compare` runs it. It talks to servers over HTTP only, so it imports nothing of the engine, the models or the
adapters: numpy, the HTTP client, `server.errors` and `server.config`. Start with `replay.py`: stored verdicts in,
statistics out. `study.py` runs a whole comparison.
"""
