"""`guanaco train`: its options, and how it ends. May import `server.training`, whose `job.py` does the work.

Start with `run.py`. `command.py` prints errors as JSON with --json.
"""
