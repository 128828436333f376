"""`config.json` of a checkpoint → `ModelConfig`. A field that asks for another computation is refused by its name.

Knows nothing of tensors or of where a checkpoint comes from. Called by `checkpoint` (safetensors) and `gguf_checkpoint`
(which first translates GGUF metadata into the same fields), so that one place decides which models can run.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guanaco.models.architectures.architecture import Architecture
from guanaco.models.architectures.config import LinearRope, Llama3Rope, ModelConfig
from guanaco.models.architectures.registry import find_architecture, model_types, names_architecture
from guanaco.models.errors import ModelError
from guanaco.models.formats.shown import joined
from guanaco.models.formats.strict_json import read_json

# The values of absent fields, as in transformers' LlamaConfig (5.23). `Architecture.defaults` overrides them.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}

# Fields of other architectures that would change the computation → the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (None, False),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (None, False),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1),
    "qk_norm": (None, False),
    "qkv_bias": (None, False),
    "residual_multiplier": (None, 1),
    "rotary_pct": (None, 1),
    "sliding_window": (None,),
    "use_qk_norm": (None, False),
}

_MAX_SHOWN_CHARS = 200


def read_config(path: Path) -> ModelConfig:
    """The config of the checkpoint directory `path`. Raises ModelError if there is none or it cannot run here."""
    return parse_config(read_json(path / "config.json"), str(path / "config.json"))


def parse_config(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """The fields of a config.json → ModelConfig. Raises ModelError, which names the field and the file (`source`)."""
    architecture = _architecture(fields, source)
    read = _Fields(fields, source, architecture)
    _refuse_other_computations(read)
    hidden_size = read.count("hidden_size")
    num_heads = read.count("num_attention_heads")
    stands_for = None if "num_key_value_heads" in fields else architecture.defaults.get("num_key_value_heads")
    num_kv_heads = read.count("num_key_value_heads", default=stands_for or num_heads)
    if num_heads % num_kv_heads != 0:
        raise read.refusal("num_key_value_heads", f"does not divide num_attention_heads ({num_heads})")
    stated = None if "head_dim" in fields else architecture.defaults.get("head_dim")
    if stated is None and fields.get("head_dim") is None and hidden_size % num_heads != 0:
        raise read.refusal(
            "hidden_size", f"is no multiple of num_attention_heads ({num_heads}), and head_dim is absent"
        )
    head_dim = read.count("head_dim", default=stated or hidden_size // num_heads)
    if head_dim % 2 != 0:
        raise read.refusal("head_dim", f"comes to {head_dim}: rotary embedding needs an even one")
    num_layers, max_positions = read.count("num_hidden_layers"), read.count("max_position_embeddings")
    theta, scaling = _parse_rope(read, max_positions)
    return ModelConfig(
        vocab_size=read.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.positive("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        attention_bias=read.flag("attention_bias"),
        mlp_bias=read.flag("mlp_bias"),
        bos_token_id=next(iter(read.token_ids("bos_token_id")), None),
        eos_token_ids=read.token_ids("eos_token_id"),
        quantization=_parse_quantization(read),
        architecture=architecture.name,
        model_type=architecture.model_type,
        sliding_window=_parse_window(read, num_layers),
    )


class _Fields:
    """Typed access to the fields of a config, with refusals that name file and field."""

    def __init__(self, fields: Mapping[str, Any], source: str, architecture: Architecture) -> None:
        self.fields = fields
        self.source = source
        self.architecture = architecture
        self.defaults = {**_DEFAULTS, **architecture.defaults}

    def refusal(self, name: str, problem: str) -> ModelError:
        value = f" = {_shown(self.fields[name])}" if name in self.fields else ""
        return ModelError(f"{self.source}: {name}{value} {problem}")

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value. If it is absent or null: the given default, else the architecture's."""
        value = self.fields.get(name)
        if value is None:
            value = self.defaults.get(name) if default is None else default
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refusal(name, "must be a whole number of at least 1")
        return value

    def positive(self, name: str) -> float:
        return _positive(self.get(name), lambda: self.refusal(name, "must be a number above 0"))

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.refusal(name, "must be true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """The ids of a field with one id, a list of ids, or null. Negative ids, as old conversions have, are
        dropped."""
        value = self.fields[name] if name in self.fields else self.defaults[name]
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise self.refusal(name, "must be a token id or a list of them")
        return tuple(i for i in ids if i >= 0)


def _shown(value: Any) -> str:
    """A value of a file for a one-line message."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + " …"


def _positive(value: Any, refusal: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise refusal()
    return float(value)


def _architecture(fields: Mapping[str, Any], source: str) -> Architecture:
    """The architecture that the fields name. Raises ModelError if it isn't served, or if the fields contradict each
    other."""
    found = find_architecture(fields)
    named = fields.get("architectures") or []
    if found is None and fields.get("model_type") is not None:
        raise ModelError(
            f"{source}: model_type = {_shown(fields['model_type'])} is not supported: only "
            f"{joined([repr(name) for name in model_types()])} run here"
        )
    if found is None or not names_architecture(named, found):
        served = "a class" if found is None else f"{found.name}"
        types = joined([repr(name) for name in model_types()] if found is None else [repr(found.model_type)])
        raise ModelError(
            f"{source}: architectures = {_shown(named)} is not supported: only {served} of model_type {types} runs here"
        )
    return found


def _refuse_other_computations(read: _Fields) -> None:
    """Raise ModelError, which names the field, if the config asks for another computation than its architecture's."""
    fields, architecture = read.fields, read.architecture
    if read.get("hidden_act") not in ("silu", "swish"):
        raise read.refusal("hidden_act", f"is not supported: the MLP of {architecture.name} uses silu")
    for name, neutral in {**_NEUTRAL, **architecture.neutral}.items():
        if name == "sliding_window" and architecture.has_window:
            continue
        if name in fields and fields[name] not in neutral:
            raise read.refusal(name, f"is not supported: it is not part of {architecture.name}")
    kinds = ("full_attention", "sliding_attention") if architecture.has_window else ("full_attention",)
    layer_types = fields.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind not in kinds for kind in layer_types)
    ):
        raise read.refusal("layer_types", "is not supported: every layer must be full_attention")


def _parse_window(read: _Fields, num_layers: int) -> int | None:
    """The sliding window in positions; None if all layers see all positions.

    If `sliding_window` is absent, the architecture's default counts; null means no window.
    """
    if not read.architecture.has_window or not read.flag("use_sliding_window"):
        return None
    if "sliding_window" in read.fields and read.fields["sliding_window"] is None:
        return None
    window = read.count("sliding_window")
    if "max_window_layers" in read.architecture.defaults:  # such an architecture has windows in its later layers
        kinds, first = read.fields.get("layer_types"), read.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int):
            raise read.refusal("max_window_layers", "must be a whole number")
        is_windowed = first < num_layers if kinds is None else "sliding_attention" in kinds
        return window if is_windowed else None
    return window


def _parse_rope(read: _Fields, max_positions: int) -> tuple[float, LinearRope | Llama3Rope | None]:
    """Base and scaling from `rope_theta` and `rope_scaling`, or from `rope_parameters` as transformers 5 writes them.

    If a config has several spellings, the same one counts as in transformers: `rope_scaling` before `rope_parameters`,
    and a base inside the dictionary before one beside it.
    """
    name = "rope_scaling" if read.fields.get("rope_scaling") else "rope_parameters"
    rope = read.fields.get(name) or {}
    if not isinstance(rope, dict):
        raise read.refusal(name, "must be an object")
    if any(isinstance(value, dict) for value in rope.values()):
        raise read.refusal(name, "is not supported: one rotary embedding for all layers is needed")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise read.refusal(name, "is not supported: partial_rotary_factor must be 1")

    def number(key: str, fallback: Any = None) -> float:
        value = rope.get(key, fallback)
        return _positive(value, lambda: read.refusal(name, f"needs a number above 0 as {key}"))

    theta = number("rope_theta", read.get("rope_theta", default=10000.0))
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(number("factor"))
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", max_positions)
        original = read.fields.get("original_max_position_embeddings", original)
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            raise read.refusal(name, "needs a whole number of at least 1 as original_max_position_embeddings")
        scaling = Llama3Rope(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise read.refusal(name, "needs a high_freq_factor above its low_freq_factor")
        return theta, scaling
    why = " (its frequencies depend on how a prompt is cut into steps)" if kind == "dynamic" else ""
    raise read.refusal(name, f"is not supported: rope type {kind!r}{why}; default, linear and llama3 are")


def _parse_quantization(read: _Fields) -> str | None:
    """Returns "nf4" for a bitsandbytes NF4 checkpoint, None for a dense one. Raises ModelError for anything else."""
    name = "quantization_config"
    quantization = read.fields.get(name)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise read.refusal(name, "must be an object")
    method = quantization.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ModelError(
            f"{read.source}: quantization_config.quant_method = {method!r} is not supported: give a bitsandbytes NF4 "
            "checkpoint, or the model in fp16, bf16 or fp32, which is quantised to NF4 at load"
        )
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        raise ModelError(
            f"{read.source}: quantization_config.load_in_8bit is not supported: give an NF4 checkpoint or a dense one"
        )
    if quantization.get("bnb_4bit_quant_type", "nf4") != "nf4":
        raise ModelError(
            f"{read.source}: quantization_config.bnb_4bit_quant_type = {quantization['bnb_4bit_quant_type']!r} "
            "is not supported: only 'nf4' is"
        )
    return "nf4"
