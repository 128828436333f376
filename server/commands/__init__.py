"""The command line: one file for each command. `main.py` puts them together.

May import everything. Start with `main.py`.
"""
