"""Fine-tuning jobs: files and jobs on disk, their queue and states, and the process that trains.

May import `recipes`, `checkpoints` and `extra` of `server.training`, and errors; never the web framework, torch or the
`train` extra's libraries, because it runs inside the server. Only `check` may import `server.training.data`, and only
`publisher` may import `server.adapters`. Start with `service.py` (called by the API) and `runner.py` (queue and
states); `records.py` has the records on disk.
"""
