"""`guanaco compare`: its options, and what it prints. The work is in `server/judging`. Start with `command.py`."""
