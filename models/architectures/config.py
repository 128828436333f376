"""`ModelConfig`: everything besides the weights on which a model's forward pass depends.

Knows nothing of files: `config_json` reads one from a `config.json`, `gguf_checkpoint` from a GGUF file's metadata.
"""

from dataclasses import asdict, dataclass
from typing import Any

from guanaco.models.errors import ModelError


@dataclass(frozen=True)
class LinearRope:
    """Divides every frequency by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """LLaMA 3.1's scaling: divides low frequencies by `factor`, keeps high ones, and blends between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the constants of one model: everything that a forward pass depends on besides the weights."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: LinearRope | Llama3Rope | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: str | None  # "nf4" if the config names bitsandbytes NF4. Each tensor's own keys say what it really is
    architecture: str = "LlamaForCausalLM"
    model_type: str = "llama"
    sliding_window: int | None = None  # the fewest positions that any layer's attention sees; None: all layers see all

    def check_window(self, source: str, max_model_len: int | None) -> None:
        """Raise ModelError if a sequence may become longer than the sliding window: windows are not implemented.

        max_model_len: the server's limit in tokens; None: the model's own. source: the model's name for the message.
        """
        longest = min(max_model_len or self.max_position_embeddings, self.max_position_embeddings)
        if self.sliding_window is not None and longest > self.sliding_window:
            raise ModelError(
                f"{source}: sliding_window = {self.sliding_window} is not supported for sequences that are longer than "
                f"the window, and here they may have {longest} tokens: give --max-model-len {self.sliding_window}"
            )

    def computation(self) -> dict[str, Any]:
        """The fields that change the results for given weights. They are part of the model's fingerprint."""
        fields = asdict(self)
        others = ("bos_token_id", "eos_token_ids", "quantization", "max_position_embeddings", "sliding_window")
        for name in (*others, "model_type"):
            del fields[name]
        if self.model_type == "llama":
            del fields["architecture"]  # so that fingerprints of LLaMA stay what they were
        fields["rope_scaling"] = {"kind": type(self.rope_scaling).__name__, **(fields["rope_scaling"] or {})}
        return fields

    def to_json(self) -> dict[str, Any]:
        """The fields as a Hugging Face `config.json` has them, in the spelling that every reader knows."""
        scaling: dict[str, Any] | None = None
        if isinstance(self.rope_scaling, LinearRope):
            scaling = {"type": "linear", "rope_type": "linear", **asdict(self.rope_scaling)}
        elif isinstance(self.rope_scaling, Llama3Rope):
            scaling = {"rope_type": "llama3", **asdict(self.rope_scaling)}
        eos: int | list[int] | None = list(self.eos_token_ids) or None
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "sliding_window": self.sliding_window,
            **({} if self.sliding_window is None else {"use_sliding_window": True, "max_window_layers": 0}),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if isinstance(eos, list) and len(eos) == 1 else eos,
        }
