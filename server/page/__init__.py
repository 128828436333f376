"""The bundled page: chat, compare, mix and operate in the browser. The Python code here only reads its files.

May import nothing of ours. Start with `files.py`; `server/api/page.py` serves the files that it reads. README.md beside
this file says where things are in the page's own code, which is in `static`.
"""
