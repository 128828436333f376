"""Qwen 3 (dense): LLaMA's layer with a norm of each head's q and k before the rotation."""

from guanaco.models.architectures.architecture import Architecture, GgufForm
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.layer_spec import ATTENTION, LayerSpec, Norm, llama_norms, llama_projections
from guanaco.models.architectures.qwen2 import QWEN2


def _layer(config: ModelConfig) -> LayerSpec:
    heads = tuple(Norm(f"self_attn.{name}_norm", config.head_dim) for name in "qk")
    biased = ATTENTION if config.attention_bias else ()
    return LayerSpec(llama_projections(config, biased), (*llama_norms(config), *heads))


QWEN3 = Architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    _layer,
    defaults={**QWEN2.defaults, "head_dim": 128},
    neutral={"mlp_bias": (None, False), "qk_norm": (None, True), "use_qk_norm": (None, True)},
    has_window=True,
    gguf=GgufForm("qwen3", tensors={"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}),
)
