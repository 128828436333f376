"""The architectures that are served, found by the fields of a config.json, and the one way to build a model.

A new one is an `Architecture` in a file of its own and an entry in `_BUILT_IN`. Called by `config_json` and `loading`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from guanaco.kernels import Ops
from guanaco.models.architectures.architecture import Architecture
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.decoder import DecoderModel, WeightSource
from guanaco.models.architectures.layer_spec import LayerSpec
from guanaco.models.architectures.llama import LLAMA
from guanaco.models.architectures.mistral import MISTRAL
from guanaco.models.architectures.qwen2 import QWEN2
from guanaco.models.architectures.qwen3 import QWEN3

_BUILT_IN = (LLAMA, MISTRAL, QWEN2, QWEN3)
_BY_MODEL_TYPE = {architecture.model_type: architecture for architecture in _BUILT_IN}


def model_types() -> list[str]:
    """The values of `model_type` that are served."""
    return list(_BY_MODEL_TYPE)


def find_architecture(fields: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a config.json: by `model_type`, else by `architectures`, else LLaMA. None if it isn't
    served."""
    model_type = fields.get("model_type")
    if model_type is not None:
        return _BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    named = fields.get("architectures") or [LLAMA.name]
    return next((one for one in _BY_MODEL_TYPE.values() if names_architecture(named, one)), None)


def names_architecture(named: object, architecture: Architecture) -> bool:
    """Whether the `architectures` of a config.json name only this one, with its head or without.

    Upper and lower case are equal: the oldest conversions of LLaMA write LLaMAForCausalLM.
    """
    whole = architecture.name.lower()
    known = (whole, whole.replace("forcausallm", "model"))
    return isinstance(named, list) and all(str(name).lower() in known for name in named)


def find_gguf(name: object) -> Architecture | None:
    """The architecture that llama.cpp calls `name`; None if it isn't served."""
    return next((one for one in _BY_MODEL_TYPE.values() if one.gguf is not None and one.gguf.name == name), None)


def gguf_names() -> list[str]:
    """The values of `general.architecture` that are served."""
    return [one.gguf.name for one in _BY_MODEL_TYPE.values() if one.gguf is not None]


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a config that was read here."""
    return _BY_MODEL_TYPE[config.model_type]


def layer_of(config: ModelConfig) -> LayerSpec:
    """What each layer of this model holds."""
    return architecture_of(config).layer(config)


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the projections of one layer by name, in the order of LoRA modules."""
    return {projection.name: projection.shape for projection in layer_of(config).projections}


def build_model(config: ModelConfig, weights: WeightSource, ops: Ops) -> DecoderModel:
    """The model of this config, each weight taken from `weights` once. Raises what `weights` raises."""
    architecture = architecture_of(config)
    return DecoderModel(config, weights, ops, architecture.layer(config), architecture.make_layer)


@contextmanager
def registered(architecture: Architecture) -> Iterator[None]:
    """Register an architecture while the `with` block runs. Raises ValueError if its model_type is taken."""
    if architecture.model_type in _BY_MODEL_TYPE:
        raise ValueError(f"model_type {architecture.model_type!r} is registered already")
    _BY_MODEL_TYPE[architecture.model_type] = architecture
    try:
        yield
    finally:
        del _BY_MODEL_TYPE[architecture.model_type]
