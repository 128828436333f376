"""The command line: one file for each verb. `main.py` puts them together.

May import everything. Start with `main.py`.
"""
