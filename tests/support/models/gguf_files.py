"""GGUF files as llama.cpp's converter writes them, made from a small checkpoint."""

from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from guanaco.models.architectures.config import LinearRope
from guanaco.models.architectures.config_json import read_config
from guanaco.models.loading.gguf_checkpoint import gguf_name

TYPES = gguf.GGMLQuantizationType


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """The converter's order of the rows of q and k: halves interleaved into neighbours."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def write_gguf(
    path: Path,
    source: Path,
    qtype: Any = TYPES.F32,
    *,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    architecture: str = "llama",
) -> Path:
    """The checkpoint at `source` as a GGUF file, its matrices stored as `qtype`. A None in `metadata` drops the key."""
    from safetensors.torch import load_file

    config = read_config(source)
    keys: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    if isinstance(config.rope_scaling, LinearRope):
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    keys |= metadata or {}
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(type(value))
        if add is not None:
            add(key if "." in key and key.split(".")[0] in ("split", "general") else f"{architecture}.{key}", value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    own_names = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored = gguf_name(name.removeprefix("model."), own_names)
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(stored.split(".")[-2])
        values = (
            (tensor if heads is None or architecture != "llama" else permuted(tensor, heads))
            .float()
            .contiguous()
            .numpy()
        )
        if stored in drop:
            continue
        if values.ndim == 1 or qtype == TYPES.F32:
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, gguf.quantize(values, qtype), raw_dtype=qtype)
    for stored, values in (extra or {}).items():
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
