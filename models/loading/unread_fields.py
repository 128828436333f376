"""What a model's configs ask for and this server does not do: told to the operator, never dropped silently.

Knows field names, not how they are used. Called once, when a model is loaded.
"""

from collections.abc import Mapping
from typing import Any

# Sampling defaults that are used, with the range that a request may have too; others are not used, and told.
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
# Values of the other fields that ask for nothing.
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
        *("mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "pretraining_tp"),
        *("_name_or_path", "name_or_path", "torch_dtype", "dtype", "transformers_version", "initializer_range"),
        *("use_cache", "attention_dropout", "hidden_dropout", "output_attentions", "output_hidden_states"),
        *("return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "auto_map", "torchscript"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "max_sequence_length"),
        *("unsloth_version", "unsloth_fixed", "use_flash_attn", "gradient_checkpointing", "is_llama_config"),
    }
)

_MAX_SHOWN = 8
_MAX_CHARS = 60


def generation_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on fields of a generation_config.json that are not used: unknown ones, and values that no request may
    have."""
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
        unread.append(f"{name} = {value!r}"[:_MAX_CHARS])
    return _note("generation_config.json asks for what is not done here", unread)


def config_notes(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on fields of a config.json that are unknown here, and so were ignored."""
    asks = (name for name, value in fields.items() if name not in _CONFIG_KNOWN and value not in (None, False, [], {}))
    return _note("config.json has fields that are unknown here and were ignored", [name[:_MAX_CHARS] for name in asks])


def _note(what: str, items: list[str]) -> tuple[str, ...]:
    if not items:
        return ()
    return (f"{what}: {', '.join(items[:_MAX_SHOWN])}{', …' if len(items) > _MAX_SHOWN else ''}",)
