"""The storage of the paged KV cache: one `LayerCache` per layer, cut into blocks.

The block manager (`server.engine.block_manager`) decides which sequence has which block. Made when the server starts;
the model writes and reads it through the ops.
"""

import torch
from torch import Tensor

from guanaco.kernels.layer_cache import CODE_LIMITS, LayerCache
from guanaco.kernels.memory import mapped_zeros
from guanaco.models.architectures.config import ModelConfig


class PagedKVCache:
    """K and V of every layer, addressed by KV slot. An 8-bit dtype has scales, too."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            on_cpu = device.type == "cpu"  # there, memory of blocks that were never written is not allocated
            return mapped_zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)

        self._layers = [LayerCache.made(shape, dtype, zeros) for _ in range(config.num_layers)]

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer; the ops write into it in place."""
        return self._layers[index]


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers together, K and V with their scales. The memory plan uses it."""
    head_bytes = config.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype in CODE_LIMITS else 0)
    return 2 * config.num_layers * block_size * config.num_kv_heads * head_bytes
