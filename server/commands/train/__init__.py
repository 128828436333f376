"""`guanaco train`: the options and how the command ends. May import `server.training`, whose `job` does the work.

Start with `run.py`; `command.py` is how it tells errors with --json.
"""
