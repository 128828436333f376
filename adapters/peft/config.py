"""Turns PEFT's adapter_config.json into an AdapterConfig, and refuses fields that the server can't honour.

Reads fields, not tensors, and knows no model: modules are names, and `matching` compares them. Called by `weights`.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.matching import (
    Resolved,
    Table,
    excluding_nothing,
    in_layer,
    matcher,
    matching_nothing,
    no_effect,
)
from guanaco.adapters.peft.patterns import Budget
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.shown import printable
from guanaco.models.formats.strict_json import JsonError, parse_object

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 64 * 1024
MAX_RANK_IN_CONFIG = 1 << 20  # keeps the arithmetic in bounds; the tensors are checked against the real limit
MAX_SCALE = 1000.0
MAX_PATTERNS = 2048  # LLaMA-65B has 560 modules, and one pattern per module is enough

# The prefix that transformers adds to the names in `targets`: configs match names with this prefix.
MODULE_PREFIX = "model."

# PEFT writes these fields, and none of them changes what the adapter computes at inference.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",  # read only when init_lora_weights is "corda", which is refused
        "eva_config",
        "inference_mode",
        "loftq_config",  # read only when init_lora_weights is "loftq", which is refused
        "lora_dropout",
        "lora_ga_config",  # read only when init_lora_weights is "lora_ga", which is refused
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # read only when use_qalora is set, which is refused
        "revision",
        "runtime_config",
        "task_type",
    }
)
UNDERSTOOD = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
# field → (code, reason). Refused if set to anything but null, false or empty; `bias` has its own default.
REFUSED = {
    "alora_invocation_tokens": (ErrorCode.ALORA_UNSUPPORTED, "activated LoRA switches on in the middle of a prompt"),
    "arrow_config": (ErrorCode.ARROW_UNSUPPORTED, "Arrow routes each token to another adapter"),
    "bias": (ErrorCode.BIAS_UNSUPPORTED, "the base model's biases are shared by all adapters"),
    "ensure_weight_tying": (ErrorCode.WEIGHT_TYING_UNSUPPORTED, "it adapts tied embeddings, which all adapters share"),
    "fan_in_fan_out": (
        ErrorCode.FAN_IN_FAN_OUT_UNSUPPORTED,
        "it transposes the matrices, as GPT-2 needs and the base model does not",
    ),
    "kasa_config": (ErrorCode.KASA_UNSUPPORTED, "KaSA changes the base model's weights"),
    "layer_replication": (ErrorCode.LAYER_REPLICATION_UNSUPPORTED, "it changes the number of layers"),
    "lora_bias": (ErrorCode.LORA_BIAS_UNSUPPORTED, "a bias on lora_B is not computed here"),
    "megatron_config": (ErrorCode.MEGATRON_UNSUPPORTED, "Megatron's layers are not the base model's"),
    "modules_to_save": (
        ErrorCode.MODULES_TO_SAVE_UNSUPPORTED,
        "full copies of modules cannot share a batch with the base",
    ),
    "monteclora_config": (ErrorCode.MONTECLORA_UNSUPPORTED, "MonteCLoRA samples its matrices"),
    "target_parameters": (
        ErrorCode.TARGET_PARAMETERS_UNSUPPORTED,
        "only linear layers can be adapted, by target_modules",
    ),
    "trainable_token_indices": (ErrorCode.TRAINABLE_TOKENS_UNSUPPORTED, "the vocabulary is shared by all adapters"),
    "use_bdlora": (ErrorCode.BDLORA_UNSUPPORTED, "BD-LoRA's block-diagonal matrices are not read here"),
    "use_dora": (ErrorCode.DORA_UNSUPPORTED, "DoRA needs the norm of every adapted column of the base model"),
    "use_qalora": (ErrorCode.QALORA_UNSUPPORTED, "QALoRA pools its inputs"),
    "velora_config": (ErrorCode.VELORA_UNSUPPORTED, "VeLoRA keeps training state among the matrices"),
}
Value = TypeVar("Value", int, float)

# Values of init_lora_weights that leave the base model as it is: they only set the A and B with which training starts.
KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# Values that subtract the initial A and B from the base model's weights (peft/tuners/lora/layer.py), so the adapter is
# wrong on any other base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The checked contents of an adapter_config.json. Module names are those of transformers, `model.layers.0.…`."""

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str  # suffixes of module names, or a pattern for the whole name, or "all-linear"
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]  # empty: all layers
    layers_pattern: tuple[str, ...]
    rank_pattern: tuple[tuple[str, int], ...]  # in the file's order; the first match counts
    alpha_pattern: tuple[tuple[str, float], ...]
    base_model: str | None  # as the adapter states it; may be a path on its author's machine
    notes: tuple[str, ...]  # for the operator: the fields that were ignored

    def resolve(self, modules: Iterable[str]) -> Resolved:
        """{module: (rank, scale)} for the targeted ones among `modules`, which are names without `model.`; their order
        is kept.

        The result's notes name the config's entries that have no effect. Raises AdapterError for a pattern that this
        server can't match, and for an absurdly large scale.
        """
        budget, names = Budget(), [MODULE_PREFIX + module for module in modules]
        targeted = matcher(self.target_modules, "target_modules", budget)
        excluded = matcher(self.exclude_modules, "exclude_modules", budget)
        ranks = Table(self.rank_pattern, "rank_pattern", self.rank, budget)
        alphas = Table(self.alpha_pattern, "alpha_pattern", self.alpha, budget)
        result = Resolved()
        for name in names:
            if excluded(name) or not targeted(name) or not self._in_layers(name):
                continue
            module, rank, alpha = name.removeprefix(MODULE_PREFIX), ranks.get(name), alphas.get(name)
            scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
            if abs(scale) > MAX_SCALE:
                problem = (
                    f"the scale of {module} is {scale:g} (alpha {alpha:g}, rank {rank}); the limit is {MAX_SCALE:g}"
                )
                raise AdapterError(ErrorCode.SCALE_TOO_LARGE, problem, "lora_alpha")
            result[module] = (rank, scale)
        unmatched = {
            "target_modules": matching_nothing(self.target_modules, names),
            "exclude_modules": excluding_nothing(self.exclude_modules, names, excluded),
            "layers_to_transform": self._missing_layers(names),
            "layers_pattern": [p for p in self.layers_pattern if not any(f".{p}." in f".{name}" for name in names)],
            "rank_pattern": ranks.unused(),
            "alpha_pattern": alphas.unused(),
        }
        result.notes = tuple(no_effect(field, entries) for field, entries in unmatched.items() if entries)
        return result

    def _missing_layers(self, names: list[str]) -> list[str]:
        """The entries of `layers_to_transform` that are not layers of the base."""
        there = {int(match["index"]) for match in map(in_layer, names) if match}
        return [str(layer) for layer in self.layers_to_transform if layer not in there]

    def _in_layers(self, name: str) -> bool:
        """Whether a module is in one of the wanted layers. Like PEFT, compares the first number in its name. If the
        config has a `layers_pattern`, the number must follow one of its entries."""
        if not self.layers_to_transform or (not isinstance(self.target_modules, str) and name in self.target_modules):
            return True
        match = in_layer(name)
        if match is None or int(match["index"]) not in self.layers_to_transform:
            return False
        return not self.layers_pattern or any(f".{match['list']}".endswith(f".{p}") for p in self.layers_pattern)


def parse_config(data: bytes) -> AdapterConfig:
    """Read the bytes of an adapter_config.json. Keys that are set and that PEFT 0.21 does not know become notes.

    Raises AdapterError that names the faulty field.
    """
    try:
        fields = parse_object(data)
    except JsonError as error:
        raise AdapterError(ErrorCode.BAD_CONFIG, f"{CONFIG_NAME} {error}", CONFIG_NAME) from None
    _check_type(fields)
    _check_refused(fields)
    _check_init(fields.get("init_lora_weights", True))
    notes = _unknown_keys(fields)
    targets = _names(fields, "target_modules", allow_pattern=True)
    if not targets:
        raise AdapterError(
            ErrorCode.NO_TARGETS, "target_modules is missing or empty; list the adapted modules", "target_modules"
        )
    layers = _layers(fields)
    layers_pattern = _names(fields, "layers_pattern", allow_pattern=False)
    if isinstance(targets, str) and (fields.get("layers_to_transform") is not None or layers_pattern):
        problem = "layers_to_transform and layers_pattern need target_modules to be a list"
        raise AdapterError(ErrorCode.CONFLICTING_FIELDS, problem, "layers_to_transform")
    if not all(re.fullmatch(r"[A-Za-z0-9_.]+", pattern) for pattern in layers_pattern):
        problem = "layers_pattern must name the list of layers, as in layers, not describe it by a pattern"
        raise AdapterError(ErrorCode.PATTERN_UNSUPPORTED, problem, "layers_pattern")
    if layers_pattern and not layers:
        problem = "layers_pattern is set without layers_to_transform; set both or neither"
        raise AdapterError(ErrorCode.CONFLICTING_FIELDS, problem, "layers_pattern")
    base = fields.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        notes += ("base_model_name_or_path is no text and was ignored: nothing says which base this adapter is for",)
    return AdapterConfig(
        rank=_rank(fields.get("r", 8), "r"),
        alpha=_number(fields.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_flag(fields, "use_rslora"),
        target_modules=targets,
        exclude_modules=_names(fields, "exclude_modules", allow_pattern=True),
        layers_to_transform=layers,
        layers_pattern=tuple(layers_pattern),
        rank_pattern=_pattern_items(fields, "rank_pattern", _rank),
        alpha_pattern=_pattern_items(fields, "alpha_pattern", _number),
        base_model=base if isinstance(base, str) else None,
        notes=notes,
    )


def _check_type(fields: dict[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind is None:
        raise AdapterError(
            ErrorCode.PEFT_TYPE_MISSING, f"{CONFIG_NAME} has no peft_type; is it a PEFT adapter?", "peft_type"
        )
    if kind != "LORA":
        problem = f"peft_type is {printable(str(kind))}; only LORA adapters can share a batch"
        raise AdapterError(ErrorCode.PEFT_TYPE_UNSUPPORTED, problem, "peft_type")


def _check_refused(fields: dict[str, Any]) -> None:
    for field, (code, why) in REFUSED.items():
        value = fields.get(field)
        if value and not (field == "bias" and value == "none"):
            raise AdapterError(code, f"{field} is set: {why}; train or convert the adapter without it", field)


def _check_init(value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    kind = value.lower() if isinstance(value, str) else str(value)
    if kind in KEEPS_BASE:
        return
    if kind.startswith(CHANGES_BASE):
        problem = (
            f"init_lora_weights is {printable(kind)}, which changes the base model's weights; make plain LoRA of it "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
        raise AdapterError(ErrorCode.INIT_CHANGES_BASE, problem, "init_lora_weights")
    problem = (
        f"init_lora_weights is {printable(kind)}, which is not known here; if it left the base as it was, write true"
    )
    raise AdapterError(ErrorCode.INIT_UNKNOWN, problem, "init_lora_weights")


def _unknown_keys(fields: dict[str, Any]) -> tuple[str, ...]:
    known = HARMLESS | UNDERSTOOD | REFUSED.keys()
    unknown = [printable(key) for key, value in fields.items() if key not in known and value]
    return tuple(f"{key} is not known here and was ignored" for key in unknown)


def _names(fields: dict[str, Any], field: str, *, allow_pattern: bool) -> tuple[str, ...] | str:
    """A list of names. A string is one name, or a pattern (kept as a string) if patterns are allowed here."""
    value = fields.get(field)
    if value is None:
        return ()
    if isinstance(value, str):
        return value if allow_pattern or not value else (value,)
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise AdapterError(ErrorCode.BAD_FIELD, f"{field} must be a list of module names", field)


def _layers(fields: dict[str, Any]) -> tuple[int, ...]:
    value = fields.get("layers_to_transform")
    layers = [value] if type(value) is int else ([] if value is None else value)
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        problem = "layers_to_transform must be a layer's number or a list of them"
        raise AdapterError(ErrorCode.BAD_FIELD, problem, "layers_to_transform")
    return tuple(layers)


def _rank(value: Any, field: str) -> int:
    if type(value) is not int or not 0 < value <= MAX_RANK_IN_CONFIG:
        raise AdapterError(
            ErrorCode.BAD_RANK, f"{field} must be a whole number above 0, not {printable(str(value))}", field
        )
    return value


def _number(value: Any, field: str) -> float:
    if type(value) not in (int, float) or abs(value) > 1e9:
        raise AdapterError(ErrorCode.BAD_ALPHA, f"{field} must be a number, not {printable(str(value)[:60])}", field)
    return float(value)


def _flag(fields: dict[str, Any], field: str) -> bool:
    value = fields.get(field)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise AdapterError(ErrorCode.BAD_FIELD, f"{field} must be true or false", field)


def _pattern_items(
    fields: dict[str, Any], field: str, check: Callable[[Any, str], Value]
) -> tuple[tuple[str, Value], ...]:
    value = fields.get(field)
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise AdapterError(ErrorCode.BAD_FIELD, f"{field} must be a table of module names", field)
    if len(value) > MAX_PATTERNS:
        raise AdapterError(
            ErrorCode.TOO_MANY_PATTERNS, f"{field} has {len(value)} entries; the limit is {MAX_PATTERNS}", field
        )
    return tuple((key, check(entry, field)) for key, entry in value.items())
