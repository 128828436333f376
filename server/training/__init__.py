"""Training: makes a LoRA adapter on the served NF4 base from a file of conversations.

May import `server.bootstrap`, `server.config`, `server.engine`, and all below the server. The only room that may import
the `train` extra's libraries (transformers, peft, accelerate, bitsandbytes), and only in the process of a training.
Start with `data/reading.py` (a file → rows) and `data/masks.py` (a row → token ids, and which of them are learned).
"""
