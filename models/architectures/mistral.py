"""Mistral: LLaMA's layer without biases. llama.cpp stores it as `llama`, so its GGUF files are read as LLaMA's."""

from guanaco.models.architectures.architecture import Architecture
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.layer_spec import LayerSpec, llama_norms, llama_projections


def _layer(config: ModelConfig) -> LayerSpec:
    return LayerSpec(llama_projections(config), llama_norms(config))


MISTRAL = Architecture(
    "MistralForCausalLM",
    "mistral",
    _layer,
    defaults={
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "use_sliding_window": True,
    },
    neutral={"attention_bias": (None, False), "mlp_bias": (None, False)},
    has_window=True,
)
