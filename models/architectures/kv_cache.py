"""The storage of the paged KV cache: one `LayerCache` per layer, cut into blocks.

No policy: which block belongs to whom is the ledger's business (server.engine.block_manager). Made by the engine's
wiring, written and read by the model through the ops.
"""

import torch
from torch import Tensor

from guanaco.kernels.layer_cache import CODE_LIMITS, LayerCache
from guanaco.kernels.memory import mapped_zeros
from guanaco.models.architectures.config import ModelConfig


class PagedKVCache:
    """K and V of every layer, addressed by KV slot, with their scales where dtype is one of 8 bits."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            on_cpu = device.type == "cpu"  # there, blocks that were never used cost nothing
            return mapped_zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)

        self._layers = [LayerCache.made(shape, dtype, zeros) for _ in range(config.num_layers)]

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer; the ops write into it in place."""
        return self._layers[index]


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, K and V with their scales: what the memory plan divides by."""
    head_bytes = config.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype in CODE_LIMITS else 0)
    return 2 * config.num_layers * block_size * config.num_kv_heads * head_bytes
