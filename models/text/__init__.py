"""Text to token ids and back: tokenizers and chat templates.

May import `models.formats` and `models.errors`. Start with `tokenizer.py`.
"""
