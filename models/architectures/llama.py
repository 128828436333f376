"""LLaMA 1, 2 and 3.x, and every model that is stored as one."""

from guanaco.models.architectures.architecture import Architecture, GgufForm
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.layer_spec import ATTENTION, MLP, LayerSpec, llama_norms, llama_projections


def _layer(config: ModelConfig) -> LayerSpec:
    biased = (*(ATTENTION if config.attention_bias else ()), *(MLP if config.mlp_bias else ()))
    return LayerSpec(llama_projections(config, biased), llama_norms(config))


LLAMA = Architecture(
    "LlamaForCausalLM",
    "llama",
    _layer,
    gguf=GgufForm(
        "llama",
        rotates_neighbours=True,
        flags={"attention_bias": "self_attn.q_proj.bias", "mlp_bias": "mlp.gate_proj.bias"},
    ),
)
