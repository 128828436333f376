"""The description of one kind of decoder: how its config is read, what a layer holds and computes, its names in GGUF.

`llama`, `mistral`, … define one each, and `registry` finds them by the fields of a config.json.
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
    # llama.cpp rotates neighbouring values in this architecture, so its rows of q and k are in another order.
    rotates_neighbours: bool = False
    tensors: Mapping[str, str] = field(default_factory=dict)  # names besides LLaMA's: ours in a layer → llama.cpp's
    # Field of config.json → tensor of the first layer: the field is true if the file has the tensor.
    flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A decoder that can be served. CONTRIBUTING.md, "A model", says how to add one."""

    name: str  # the class in `architectures`: "LlamaForCausalLM"
    model_type: str  # "llama"
    layer: Callable[[ModelConfig], LayerSpec]
    make_layer: MakeLayer = decoder_layer
    # The values of absent fields, if they differ from LLaMA's; from transformers' config class.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Fields that would change the computation → the values that don't. Any other value is refused.
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    has_window: bool = False  # `sliding_window` is one of its fields
    gguf: GgufForm | None = None
