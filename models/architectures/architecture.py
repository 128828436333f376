"""One kind of decoder, described: how its config is read, what a layer holds, how a layer computes, what GGUF calls it.

`llama`, `mistral`, … make one each, and `registry` finds them by a config.json's fields.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.decoder import MakeLayer, decoder_layer
from guanaco.models.architectures.layer_spec import LayerSpec


@dataclass(frozen=True)
class GgufForm:
    """How llama.cpp stores an architecture."""

    name: str  # `general.architecture`, and the prefix of its metadata
    # llama.cpp rotates neighbours in these architectures, so that its rows of q and k are in another order.
    rotates_neighbours: bool = False
    tensors: Mapping[str, str] = field(default_factory=dict)  # besides LLaMA's: our name in a layer → llama.cpp's
    # Fields of config.json that a tensor of the first layer stands for: the field is true where the tensor is stored.
    flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A decoder that can be served. `docs` for a new one: CONTRIBUTING.md, "a model"."""

    name: str  # the class in `architectures`: "LlamaForCausalLM"
    model_type: str  # "llama"
    layer: Callable[[ModelConfig], LayerSpec]
    make_layer: MakeLayer = decoder_layer
    # Values of absent fields where they differ from LLaMA's; what transformers' config class says.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Fields that would change the computation, with the values that don't; others are refused by the field's name.
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    has_window: bool = False  # `sliding_window` is one of its fields
    gguf: GgufForm | None = None
