"""Computes which models, adapters and contexts fit into free memory: from shapes, with the server's memory plan.

Loads no model. Called by `doctor.py`, for the chosen model and for well-known LLaMA shapes.
"""

from dataclasses import dataclass

from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.config_json import parse_config
from guanaco.models.architectures.kv_cache import block_bytes
from guanaco.models.architectures.registry import projection_shapes
from guanaco.server.bootstrap.dtypes import expected_cache_dtype
from guanaco.server.bootstrap.gpu import Gpu
from guanaco.server.bootstrap.gpu_runtime import gpu_reserve_bytes
from guanaco.server.bootstrap.machine import Machine
from guanaco.server.bootstrap.memory_plan import AUTO_KV_SHARE, GPU_KV_SHARE, KvRequest, plan_memory
from guanaco.server.config import Settings
from guanaco.server.errors import CommandError

ADAPTER_COUNTS = (1, 16, 128)
ADAPTER_RANK = 16  # on all seven projections of every layer, as most fine-tunes have
# Bits of one NF4 weight with double quantisation: 4, plus 8 per 64 weights (scale) and 32 per 16,384 (scale of scales).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)

# Name → hidden size, inner size, layers, heads, key-value heads, vocabulary, positions, whether the head is tied.
_SHAPES = {
    "SmolLM2-135M (the demo)": (576, 1536, 30, 9, 3, 49152, 8192, True),
    "TinyLlama-1.1B": (2048, 5632, 22, 32, 4, 32000, 2048, False),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, 131072, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, 131072, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, 4096, False),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, 131072, False),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000, 4096, False),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256, 131072, False),
}


@dataclass(frozen=True)
class Room:
    """The room that a server has besides the weights and `adapters` adapters."""

    adapters: int
    context: int  # tokens of the longest request
    requests: int  # requests of this length at the same time
    kv_tokens: int  # tokens of all requests together


@dataclass(frozen=True)
class Fit:
    """One model in the memory that is free now. Sizes in bytes."""

    model: str
    weights_bytes: int
    adapter_bytes: int  # size of one adapter of ADAPTER_RANK
    rooms: tuple[Room, ...]  # only for the numbers of adapters that fit


def predict(model: str, config: ModelConfig, settings: Settings, machine: Machine, gpu: Gpu | None) -> Fit:
    """The room of a server with these settings, without adapters and with each number in ADAPTER_COUNTS."""
    adapter = adapter_bytes(config, element_bytes=4 if gpu is None else 2)
    rooms = (_room(count, adapter, config, settings, machine, gpu) for count in (0, *ADAPTER_COUNTS))
    return Fit(model, weights_bytes(config), adapter, tuple(room for room in rooms if room is not None))


def predict_known(settings: Settings, machine: Machine, gpu: Gpu | None) -> list[Fit]:
    """The fits of the well-known models in _SHAPES, as `predict` computes them."""
    return [predict(name, _known(name), settings, machine, gpu) for name in _SHAPES]


def weights_bytes(config: ModelConfig) -> int:
    """Bytes of a model with NF4 projections (double quantisation) and everything else in 16 bits, without decoded
    copies."""
    projections = config.num_layers * sum(n * k for n, k in projection_shapes(config).values())
    heads = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return int(projections * NF4_BITS / 8) + heads * 2


def adapter_bytes(config: ModelConfig, *, element_bytes: int) -> int:
    """Bytes of A and B of one adapter of ADAPTER_RANK. PEFT saves float32; the GPU's copy has 16 bits."""
    sides = config.num_layers * sum(n + k for n, k in projection_shapes(config).values())
    return sides * ADAPTER_RANK * element_bytes


def _room(
    count: int, adapter: int, config: ModelConfig, settings: Settings, machine: Machine, gpu: Gpu | None
) -> Room | None:
    """The room with `count` adapters; None if they don't fit. Adapters above --adapter-host-memory stay on disk and
    take no memory."""
    in_memory = min(count * adapter, settings.adapter_host_memory)
    if gpu is None:
        free, share = machine.memory_available_bytes - in_memory, AUTO_KV_SHARE
    else:
        reserved = settings.adapter_device_memory + gpu_reserve_bytes(settings, config)
        free, share = gpu.free_bytes - reserved, GPU_KV_SHARE
        if in_memory > machine.memory_available_bytes:
            return None
    free -= weights_bytes(config)
    request = KvRequest(
        block_bytes=block_bytes(config, settings.block_size, expected_cache_dtype(settings)),
        block_size=settings.block_size,
        kv_bytes=settings.kv_cache_memory,
        max_model_len=None
        if settings.max_model_len is None
        else min(settings.max_model_len, config.max_position_embeddings),
        model_positions=config.max_position_embeddings,
        max_num_seqs=settings.max_num_seqs,
    )
    if free <= (settings.kv_cache_memory or 0):
        return None
    try:
        plan = plan_memory(
            request, weights_bytes=weights_bytes(config), adapters_bytes=in_memory, free_bytes=free, share=share
        )
    except CommandError:  # the KV cache would be too small for the settings
        return None
    return Room(count, plan.max_model_len, plan.kv_tokens // plan.max_model_len, plan.kv_tokens)


def _known(name: str) -> ModelConfig:
    hidden, inner, layers, heads, kv_heads, vocabulary, positions, is_tied = _SHAPES[name]
    fields = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": is_tied,
    }
    return parse_config(fields, name)
