"""Start-up work for the `triton` provider only: CUDA graphs, tuned tiles, memory to keep free, notes for the banner.

Used by `runtime`. Triton is imported only if that provider was chosen.
"""

import re
from pathlib import Path

from guanaco.kernels import Ops
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.decoder import DecoderModel
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.architectures.registry import projection_shapes
from guanaco.server.bootstrap.gpu import find_gpu
from guanaco.server.config import Settings
from guanaco.server.engine.model_runner import DecodePath
from guanaco.server.errors import CommandError

# Bytes of the CUDA context, Triton's kernels and cuBLAS's workspaces. A guess, never measured.
_CONTEXT_BYTES = 512 << 20


def make_decode_path(
    settings: Settings, model: DecoderModel, ops: Ops, kv: PagedKVCache, max_model_len: int
) -> DecodePath | None:
    """The CUDA graphs for decode steps; None if they are switched off or not possible. Raises CommandError if the
    settings allow larger adapter ranks than the provider has."""
    if ops.name != "triton":
        return None
    from guanaco.kernels.triton.ops import TritonOps
    from guanaco.kernels.triton.products.lora import RANK_BUCKETS
    from guanaco.server.engine.cuda_graphs import CudaCapture, DecodeGraphs

    assert isinstance(ops, TritonOps)
    if settings.max_lora_rank > RANK_BUCKETS[-1]:
        raise CommandError(f"--max-lora-rank {settings.max_lora_rank}: the triton provider has {RANK_BUCKETS[-1]}")
    if not settings.cuda_graphs or ops.device.type != "cuda" or not model.is_fused:
        return None
    return DecodeGraphs(
        model,
        ops,
        kv,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=max_model_len,
        num_slots=settings.adapter_slots,
        capture=CudaCapture(),
    )


def tuned_path(settings: Settings, name: str) -> Path:
    """The path of the file with the tiles that were timed on a card of this name."""
    return settings.cache_dir / f"tuned-kernels-{re.sub('[^A-Za-z0-9]+', '-', name)}.json"


def use_tuned_kernels(settings: Settings, ops: Ops) -> tuple[str, ...]:
    """Use the tiles that were timed on this card, if there are any and the settings want them. Returns notes."""
    if ops.name != "triton" or not settings.tuned_kernels:
        return ()
    gpu = find_gpu()
    if gpu is None:
        return ()
    from guanaco.kernels.triton import configs as triton_configs
    from guanaco.kernels.triton import tuning as triton_tuning

    tiles, note = triton_tuning.load(tuned_path(settings, gpu.name), triton_tuning.card_key(gpu.name, gpu.target))
    triton_configs.use_tuned(tiles)
    return (f"triton: {note}",) if note else ()


def gpu_notes(settings: Settings, ops: Ops, model: DecoderModel) -> list[str]:
    """Notes for the banner: which parts of this provider have run on which hardware, and which are not used."""
    if ops.name != "triton":
        return []
    from guanaco.kernels.triton.ops import HAS_RUN

    notes = [f"triton: {HAS_RUN}"]
    if not model.is_fused:
        notes.append(
            "triton: layers run op by op, slower and without graphs: some projections are dense, or their rows are "
            "no whole groups of 64, or the architecture has parts that are not fused"
        )
    elif ops.device.type == "cuda":
        notes.append(f"triton: decode steps {'are CUDA graphs' if settings.cuda_graphs else 'are launched one by one'}")
    return notes


def gpu_reserve_bytes(settings: Settings, config: ModelConfig) -> int:
    """Bytes that must stay free beside weights, adapters and KV cache: one merged weight decoded to 16 bits (prompts),
    a step's activations, and the logits of all sequences."""
    shapes = projection_shapes(config)
    merged = 2 * max(2 * n * k for n, k in shapes.values())
    activations = 4 * (6 * config.hidden_size + 2 * config.intermediate_size) * settings.max_num_batched_tokens
    logits = 4 * 4 * config.vocab_size * settings.max_num_seqs
    return merged + activations + logits + _CONTEXT_BYTES
