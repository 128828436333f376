"""The base model: its architecture, how it is loaded, and its tokenizer.

May import `kernels`; knows nothing of adapters, requests or HTTP. Start with `architectures/decoder.py`, then
`loading/loader.py`.
"""
