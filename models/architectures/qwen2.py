"""Qwen 1.5, 2 and 2.5: LLaMA's layer with biases of q, k and v."""

from guanaco.models.architectures.architecture import Architecture, GgufForm
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.layer_spec import ATTENTION, LayerSpec, llama_norms, llama_projections


def _layer(config: ModelConfig) -> LayerSpec:
    return LayerSpec(llama_projections(config, ATTENTION[:3]), llama_norms(config))


QWEN2 = Architecture(
    "Qwen2ForCausalLM",
    "qwen2",
    _layer,
    defaults={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    neutral={"attention_bias": (None, False), "mlp_bias": (None, False), "qkv_bias": (None, True)},
    has_window=True,
    gguf=GgufForm("qwen2"),
)
