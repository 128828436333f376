"""Fine-tuning jobs: files and jobs on disk, their queue and states, and the process that trains.

May import `server.training.jobs`, the recipes, the errors and the JSON reader; never the web framework, torch or the
`train` extra's libraries, because it runs inside the server. Only `publisher` may import `server.adapters`.
Start with `service.py` (what the API calls) and `runner.py` (queue and states); `records.py` has what is kept.
"""
