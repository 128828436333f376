"""LoRA adapters: what they are on disk, which versions exist, and where each version's weights are.

May import `kernels` and, of the models, only `models.formats`; knows nothing of requests or HTTP. Start with
`versions/registry.py`.
"""
