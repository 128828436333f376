"""Notes for the operator on fields of a model's configs that this server does not use. None is dropped silently.

Knows field names, not how they are used. Called once, when a model is loaded.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from guanaco.models.formats.shown import joined, listed, shown

# Sampling defaults that are used, with the range that requests may use, too. Other fields and values make a note.
_SAMPLING: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 1000),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 2.0),
}
# Fields of generation_config.json (transformers 5.23) that change no answer, or are read elsewhere.
_GENERATION_READ = frozenset(
    {
        *("do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "_from_model_config", "transformers_version"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("compile_config", "disable_compile", "continuous_batching_config", "max_length", "max_time", "chat_format"),
    }
)
# Values of further fields that change nothing, and so make no note.
_GENERATION_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "typical_p": (1, 1.0),
    "length_penalty": (1, 1.0),
    "diversity_penalty": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "top_h": (1, 1.0),
}
# Fields of config.json that are read, or that change no answer (transformers' LlamaConfig and its base, old and new).
_CONFIG_KNOWN = frozenset(
    {
        *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings"),
        *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias"),
        *("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "qkv_bias"),
        *("mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "pretraining_tp"),
        *("_name_or_path", "name_or_path", "torch_dtype", "dtype", "transformers_version", "initializer_range"),
        *("use_cache", "attention_dropout", "hidden_dropout", "output_attentions", "output_hidden_states"),
        *("return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "auto_map", "torchscript"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "max_sequence_length"),
        *(
            "unsloth_version",
            "unsloth_fixed",
            "original_max_position_embeddings",
            "use_flash_attn",
            "gradient_checkpointing",
            "is_llama_config",
        ),
    }
)

# Sampling defaults of a GGUF file that are used. llama.cpp has more, but its repetition penalty counts only the last
# tokens, so it is another one than ours.
_GGUF_SAMPLING: Mapping[str, str] = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
}
# Fields of rope_scaling and rope_parameters that every rope type has, and those of each one.
_ROPE_READ = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_ROPE_OF = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Keys of a GGUF file's own metadata (`llama.…`, `qwen2.…`) that are read, refused where set, or
# change no answer (llama.cpp's names).
_GGUF_READ = frozenset(
    {
        *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_rms_epsilon", "attention.causal", "rope.dimension_count", "rope.freq_base"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "expert_count", "logit_scale"),
        *("attention.sliding_window", "attention.clamp_kqv", "rope.scaling.finetuned"),
        *("rope.scaling.original_context_length", "expert_used_count", "use_parallel_residual", "tensor_data_layout"),
    }
)


def generation_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on fields of a generation_config.json that are not used: unknown fields, and values outside the range that
    requests may use."""
    unread = []
    for name, value in config.items():
        if name in _GENERATION_READ or value is None or value is False or value in ([], {}):
            continue
        if name in _SAMPLING:
            least, most = _SAMPLING[name]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and least <= value <= most and (name != "top_k" or value == int(value)):
                continue
        elif value in _GENERATION_NEUTRAL.get(name, (0,)):
            continue
        unread.append(f"{listed([name])} = {shown(value)}")
    return _note("these sampling defaults of the model are not used here", unread)


def config_notes(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on fields of a config.json that are unknown here, and so were ignored."""
    asks = [name for name, value in fields.items() if name not in _CONFIG_KNOWN and value not in (None, False, [], {})]
    notes = _note("config.json has fields that are unknown here and were ignored", [listed([name]) for name in asks])
    if fields.get("auto_map"):
        notes += ("config.json names code of its own (auto_map): it is never run; model_type decides",)
    bos = fields.get("bos_token_id")
    if isinstance(bos, list) and len(bos) > 1:
        notes += (f"config.json has {len(bos)} ids as bos_token_id: the first, {shown(bos[0])}, is used",)
    return (*notes, *_rope_notes(fields))


def _rope_notes(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on fields of rotary scaling that another spelling overrides (`config_json` has the order), and on fields
    that the rope type does not use. The fields have been checked."""
    scaling, parameters = fields.get("rope_scaling"), fields.get("rope_parameters")
    name, rope = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    if not isinstance(rope, Mapping) or not rope:
        return ()
    notes, theta = [], fields.get("rope_theta")
    if isinstance(parameters, Mapping) and scaling and parameters:
        ours, theirs = (
            {"rope_theta": 10000.0 if theta is None else theta, **_modern_rope(one)} for one in (rope, parameters)
        )
        if ours != theirs:
            notes.append(
                "config.json's rope_scaling and rope_parameters differ: rope_scaling is used, as in transformers"
            )
    kind = rope.get("rope_type", rope.get("type")) or "default"
    beside = [
        ("rope_theta", theta),
        ("original_max_position_embeddings", fields.get("original_max_position_embeddings")),
    ]
    for key, value in beside:
        inside = rope.get(key)
        if value is not None and inside not in (None, value):
            used = inside if key == "rope_theta" else value
            notes.append(f"config.json's {key} is {shown(value)}, and {shown(inside)} in {name}: {shown(used)} is used")
    if rope.get("type") not in (None, kind):
        notes.append(
            f"{name} in config.json says type {shown(rope['type'])} and rope_type {shown(kind)}: rope_type is used"
        )
    unread = [
        key for key, value in rope.items() if value is not None and key not in (*_ROPE_READ, *_ROPE_OF.get(kind, ()))
    ]
    if unread:
        notes.append(f"{name} in config.json has fields that rope type {shown(kind)} does not use: {listed(unread)}")
    return tuple(notes)


def _modern_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in rope.items() if value is not None and key != "type"}
    return {**fields, "rope_type": rope.get("rope_type", rope.get("type")) or "default"}


def gguf_notes(metadata: Mapping[str, Any], num_rows: int) -> tuple[str, ...]:
    """Notes on keys of a GGUF file that are not used, except the tokenizer's (see `gguf_tokenizer`). num_rows: the rows
    of its embedding."""
    prefix = f"{metadata.get('general.architecture')}."
    unread = (key for key, value in metadata.items() if key.startswith(prefix) and value not in (None, False, "", []))
    asks = [key for key in unread if key.removeprefix(prefix) not in _GGUF_READ]
    notes = [f"the GGUF file has keys that are unknown here and were ignored: {listed(asks)}"] if asks else []
    asked = [(key, value) for key, value in metadata.items() if key.startswith("general.sampling.")]
    sampling = [f"{listed([key])} = {shown(value)}" for key, value in asked if key not in _GGUF_SAMPLING]
    if sampling:
        notes.append(f"the GGUF file's further sampling defaults are not used here: {joined(sampling)}")
    old, factor = metadata.get(prefix + "rope.scale_linear"), metadata.get(prefix + "rope.scaling.factor")
    kind = metadata.get(prefix + "rope.scaling.type")
    if kind == "none" and any(value not in (None, 0, 1) for value in (old, factor)):
        notes.append("the GGUF file has a factor of rope scaling and says type none: positions are not scaled")
    elif None not in (old, factor) and old != factor:
        text = (
            f"the GGUF file says {prefix}rope.scaling.factor {shown(factor)} and {prefix}rope.scale_linear {shown(old)}"
        )
        notes.append(f"{text}: the first is used, as in llama.cpp")
    stated = metadata.get(prefix + "vocab_size")
    if stated not in (None, num_rows):
        notes.append(f"the GGUF file says {prefix}vocab_size {shown(stated)}: its embedding's {num_rows} rows are used")
    return tuple(notes)


def gguf_sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling defaults of a GGUF file that are used, by the names that generation_config.json has for them."""
    found = {name: metadata[key] for key, name in _GGUF_SAMPLING.items() if key in metadata}
    # A float32 0.6 reads as 0.6000000238 in float64. The shortest decimal of the float32 restores 0.6.
    return {name: float(str(np.float32(v))) if isinstance(v, float) else v for name, v in found.items()}


def _note(what: str, items: list[str]) -> tuple[str, ...]:
    if not items:
        return ()
    return (f"{what}: {joined(items)}",)
