"""The paged KV cache: shapes, zeros, bytes."""

import torch

from guanaco.models.architectures.config_json import parse_config
from guanaco.models.architectures.kv_cache import PagedKVCache, block_bytes

CONFIG = parse_config(
    {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 3}, "config.json"
)


def test_every_layer_has_its_own_zeroed_blocks() -> None:
    cache = PagedKVCache(CONFIG, num_blocks=7, block_size=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    tensors = [tensor for layer in range(3) for tensor in cache.layer(layer).tensors]
    assert len({tensor.data_ptr() for tensor in tensors}) == 6
    for tensor in tensors:
        assert tensor.shape == (7, 4, 1, 16)
        assert tensor.dtype == torch.bfloat16
        assert not tensor.any()


def test_block_bytes_is_what_a_block_costs() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        cache = PagedKVCache(CONFIG, num_blocks=5, block_size=3, dtype=dtype, device=torch.device("cpu"))
        total = sum(tensor.nbytes for layer in range(3) for tensor in cache.layer(layer).tensors)
        assert total == 5 * block_bytes(CONFIG, 3, dtype)


def test_8_bits_have_scales_of_their_own() -> None:
    cache = PagedKVCache(CONFIG, num_blocks=7, block_size=4, dtype=torch.int8, device=torch.device("cpu")).layer(1)
    assert cache.k.dtype == cache.v.dtype == torch.int8
    assert [tensor.shape for tensor in cache.tensors] == [(7, 4, 1, 16)] * 2 + [(7, 1, 4)] * 2
    assert block_bytes(CONFIG, 4, torch.int8) == 3 * 2 * 4 * (16 + 4)


def test_memory_is_committed_only_when_it_is_written() -> None:
    """A gigabyte of cache must not cost a gigabyte at start."""
    before = _resident_bytes()
    cache = PagedKVCache(CONFIG, num_blocks=(1 << 30) // block_bytes(CONFIG, 16, torch.float32), block_size=16,
                         dtype=torch.float32, device=torch.device("cpu"))  # fmt: skip
    assert _resident_bytes() - before < 64 << 20
    cache.layer(0).k.fill_(1.0)
    assert _resident_bytes() - before > 100 << 20


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
