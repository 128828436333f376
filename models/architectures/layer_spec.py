"""What one decoder layer holds, as data: its projections with their biases, and its norms.

Read by everything that needs names and shapes but no tensors: the model's builder, the quantiser, the memory plan.
"""

from collections.abc import Collection
from dataclasses import dataclass

from guanaco.models.architectures.config import ModelConfig


@dataclass(frozen=True)
class Projection:
    """A linear layer that is stored in 4 bits and that adapters may change."""

    name: str  # Hugging Face's within a layer: "self_attn.q_proj"
    shape: tuple[int, int]  # (out, in)
    has_bias: bool = False


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's weight."""

    name: str  # Hugging Face's within a layer: "input_layernorm"
    size: int


@dataclass(frozen=True)
class LayerSpec:
    """One layer. A projection's place in the list is its LoRA module's number within the layer."""

    projections: tuple[Projection, ...]
    norms: tuple[Norm, ...]

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor: weights, each followed by its bias, then norms."""
        found: list[tuple[str, tuple[int, ...]]] = []
        for projection in self.projections:
            found.append((f"{projection.name}.weight", projection.shape))
            if projection.has_bias:
                found.append((f"{projection.name}.bias", projection.shape[:1]))
        return found + [(f"{norm.name}.weight", (norm.size,)) for norm in self.norms]


def llama_projections(config: ModelConfig, biased: Collection[str] = ()) -> tuple[Projection, ...]:
    """Grouped-query attention and a gated MLP, as LLaMA names them. biased: the names that have a bias."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    return tuple(Projection(name, shape, name in biased) for name, shape in shapes.items())


def llama_norms(config: ModelConfig) -> tuple[Norm, ...]:
    """One norm before attention, one before the MLP."""
    return tuple(Norm(name, config.hidden_size) for name in ("input_layernorm", "post_attention_layernorm"))


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
