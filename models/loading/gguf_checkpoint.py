"""A GGUF file as a source of weights: metadata → ModelConfig, tensors decoded by `gguf`.

llama.cpp stores the rows of LLaMA's q and k in another order, since it rotates neighbouring values where Hugging Face
rotates the two halves. That is undone here. Knows nothing of NF4 or of tokenizers, and passes the tokenizer's metadata
on. Called by `checkpoint` and by the demo's conversion.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guanaco.kernels.memory import mapped_zeros
from guanaco.models.architectures.architecture import Architecture
from guanaco.models.architectures.config import Llama3Rope, ModelConfig
from guanaco.models.architectures.config_json import parse_config
from guanaco.models.architectures.layers import rope_frequencies
from guanaco.models.architectures.registry import find_gguf, gguf_names
from guanaco.models.errors import ModelError
from guanaco.models.formats.gguf import GgufTensor, read_table
from guanaco.models.formats.raw_file import FileLayout, RawFile
from guanaco.models.formats.shown import joined, shown
from guanaco.models.loading.unread_fields import gguf_notes, gguf_sampling
from guanaco.models.text.gguf_tokenizer import end_ids

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # types that need no decoding
_TOP = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# A tensor of factors that the converter computes from LLaMA 3.1's rope scaling. No metadata names its parameters.
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_CONSTANTS = (1.0, 4.0, 8192)  # low and high frequency factor, original positions: every LLaMA 3.1 to 3.3


def gguf_name(name: str, tensors: Mapping[str, str] = MappingProxyType({})) -> str:
    """`layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`. tensors: an architecture's names besides LLaMA's."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("layers."):
        return f"{_TOP[module]}.{kind}"
    _, index, part = module.split(".", 2)
    return f"blk.{index}.{tensors.get(part) or _LAYER[part]}.{kind}"


class GgufCheckpoint:
    """An open GGUF file. `metadata` has its key-value pairs as Python values; `config` is made from them."""

    is_quantized = False  # not in NF4, whatever GGUF type its tensors have

    def __init__(self, path: Path) -> None:
        """Read the metadata and the table of tensors. Raises ModelError if the architecture is not supported or the
        file is damaged."""
        self.path = path
        self._file = RawFile(path)
        try:
            self.metadata, self._entries = read_table(self._file)
            self.config = self._parse_config()
        except BaseException:
            self.close()
            raise
        self.sampling = gguf_sampling(self.metadata)
        self.notes = list(gguf_notes(self.metadata, self.config.vocab_size))
        self.num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        self._asked = {_ROPE_FACTORS}

    def close(self) -> None:
        self._file.close()

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A linear layer's weight [out, in]: a projection in float32, the head in the dtype of `tensor`."""
        return self._rows_by_halves(name, self._read(name, shape, full=name.startswith("layers.")))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Any other tensor, in the file's dtype, or in float16 if the file has it quantised."""
        return self._rows_by_halves(name, self._read(name, shape, full=False))

    def unused(self) -> tuple[str, ...]:
        """Names of the tensors that were not read."""
        return tuple(sorted(self._entries.keys() - self._asked))

    def layouts(self) -> list[FileLayout]:
        """The layout of the one file, from which the model cache makes its key."""
        entries = sorted(self._entries.items(), key=lambda item: item[1].offset)
        table = [(name, entry.type.name, entry.shape, entry.offset) for name, entry in entries]
        return [FileLayout(self.path, repr(table).encode(), tuple((e.offset, e.num_bytes) for _, e in entries))]

    def _read(self, name: str, shape: tuple[int, ...], *, full: bool) -> Tensor:
        stored_name = gguf_name(name, self._form.tensors)
        entry = self._entries.get(stored_name)
        if entry is None:
            raise ModelError(f"{self.path}: the tensor {stored_name} is missing; the file is incomplete: get it again")
        if entry.shape != shape:
            raise ModelError(
                f"{self.path}: {stored_name} has shape {list(entry.shape)}, the metadata make it {list(shape)}; "
                "the file contradicts itself: get it again"
            )
        self._asked.add(stored_name)
        data = mapped_zeros((entry.num_bytes,), torch.uint8, huge=True).numpy()
        self._file.read_into(entry.offset, data)
        return self._decode(stored_name, entry, data, full=full)

    def _rows_by_halves(self, name: str, stored: Tensor) -> Tensor:
        """Bring the rows of q and k, weight or bias, from llama.cpp's order (pairs side by side) into Hugging Face's
        (two halves). Does nothing for architectures that llama.cpp stores in halves."""
        if not self._form.rotates_neighbours:
            return stored
        part = gguf_name(name, self._form.tensors).split(".")[-2]
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}.get(part)
        return stored if heads is None else stored.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(stored.shape)

    def _decode(self, name: str, entry: GgufTensor, data: Any, *, full: bool) -> Tensor:
        plain = _PLAIN.get(entry.type.name)
        if plain is not None:
            return torch.from_numpy(data).view(plain).view(entry.shape)
        import gguf  # here, because a start from safetensors does without it

        try:
            rows = data.reshape(gguf.quant_shape_to_byte_shape(entry.shape, entry.type))
            decoded = torch.from_numpy(gguf.dequantize(rows, entry.type))
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: {name} is stored as {entry.type.name}, which the gguf package cannot decode; "
                "give a file with another quantisation"
            ) from None
        return decoded if full else decoded.half()

    def _parse_config(self) -> ModelConfig:
        name = self.metadata.get("general.architecture")
        architecture = find_gguf(name)
        if architecture is None or architecture.gguf is None:
            raise ModelError(
                f"{self.path}: general.architecture = {shown(name)} is not supported: only {joined(gguf_names())} are"
            )
        self._form = architecture.gguf
        if self.metadata.get("split.count", 1) > 1:
            raise ModelError(f"{self.path} is one part of several; join them with `llama-gguf-split --merge` first")
        config = parse_config(_config_fields(self.path, self.metadata, self._entries, architecture), str(self.path))
        if _ROPE_FACTORS in self._entries:
            return self._with_llama3_rope(config)
        return config

    def _with_llama3_rope(self, config: ModelConfig) -> ModelConfig:
        """The config with the LLaMA 3.x scaling that explains the file's factors. Raises ModelError if none does."""
        entry = self._entries[_ROPE_FACTORS]
        factors = torch.frombuffer(bytearray(self._file.read_bytes(entry.offset, entry.num_bytes)), dtype=torch.float32)
        scaled = replace(config, rope_scaling=Llama3Rope(float(factors.max()), *_LLAMA3_CONSTANTS))
        expected = rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(scaled)
        matches = expected.shape == factors.shape and torch.allclose(expected, factors, rtol=1e-4)
        if config.rope_scaling is not None or not matches:
            raise ModelError(
                f"{self.path}: {_ROPE_FACTORS} does not follow LLaMA 3.x's rule (factors 1 and 4 around 8192 "
                "positions); other tables of frequencies are not supported"
            )
        return scaled


def _config_fields(
    path: Path, metadata: dict[str, Any], entries: dict[str, GgufTensor], architecture: Architecture
) -> dict[str, Any]:
    """The metadata as fields of a config.json. `parse_config` checks them later."""

    form = architecture.gguf
    assert form is not None

    def get(key: str, *, needed: bool = True) -> Any:
        value = metadata.get(f"{form.name}.{key}")
        if value is None and needed:
            raise ModelError(f"{path}: the metadata lack {form.name}.{key}; the file is incomplete: get it again")
        # A float32 1e-6 reads as 9.9999999747e-7 in float64. The shortest decimal of the float32 restores 1e-6.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def has(name: str) -> bool:
        return gguf_name(name, form.tensors) in entries

    embedding = entries.get("token_embd.weight")
    heads = get("attention.head_count")
    head_dim = get("attention.key_length", needed=False) or get("embedding_length") // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, needed=False) not in (None, head_dim):
            raise ModelError(
                f"{path}: {form.name}.{key} = {get(key)} is not supported: it must be the key length, {head_dim}"
            )
    for key in ("expert_count", "attention.sliding_window", "attention.clamp_kqv", "logit_scale"):
        if get(key, needed=False):
            raise ModelError(
                f"{path}: {form.name}.{key} = {shown(get(key))} is not supported: it is not part of {architecture.name}"
            )
    if get("attention.causal", needed=False) is False:
        raise ModelError(
            f"{path}: {form.name}.attention.causal = False is not supported: such a model generates no text"
        )
    return {
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0] if embedding else get("vocab_size"),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", needed=False),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", needed=False),
        "rope_scaling": _rope_scaling(get),
        "tie_word_embeddings": not has("lm_head.weight"),
        "sliding_window": None,
        **{field: has(f"layers.0.{tensor}") for field, tensor in form.flags.items()},
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_ids(metadata, str(path)),
    }


def _rope_scaling(get: Callable[..., Any]) -> dict[str, Any] | None:
    """The metadata's rope scaling as config.json has it; None if positions are not scaled. As in llama.cpp, an absent
    type means linear, an absent factor is read from the older key, and a factor of 0 or 1 scales nothing."""
    kind = get("rope.scaling.type", needed=False) or "linear"
    factor = get("rope.scaling.factor", needed=False)
    if factor is None:
        factor = get("rope.scale_linear", needed=False)
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return None
    return {"rope_type": kind, "factor": factor}
