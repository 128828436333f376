"""Training data: files of several formats → rows → token ids, with the tokens that the model has to learn marked.

May import `models.text` and `models.formats`; needs no library of the `train` extra, so that a server can check an
uploaded file. Start with `reading.py`: `read_conversations` makes rows and refusals from a file.
"""
