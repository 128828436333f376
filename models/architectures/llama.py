"""LLaMA, as the paper has it: embed; per layer attention and MLP on normalised input, each added back; logits.

Knows no requests, adapters or files: rows come in a `ForwardBatch`, keys and values live in a `PagedKVCache`, weights
come one by one from a `WeightSource`. Built by `loader`, run by the model runner.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from guanaco.kernels import LayerWeights, LinearHandle, Ops, PackedWeight
from guanaco.kernels.layer_cache import LayerCache
from guanaco.kernels.nf4 import Nf4Weight
from guanaco.models.architectures.config import LlamaConfig
from guanaco.models.architectures.forward_batch import ForwardBatch
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.architectures.layers import QuantLinear, RMSNorm, Rotary


class WeightSource(Protocol):
    """Where weights come from, each asked for once, in the order of `LlamaModel.__init__`. Names are Hugging Face's
    without the leading `model.`; a source raises ModelError for a tensor that is missing or has another shape."""

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | PackedWeight | Tensor:
        """The [out, in] weight of a linear layer, a projection or the head."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Anything else: embedding, norm, bias."""


def projection_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven projections of one layer, in the order that counts modules."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention with rotary positions over a paged cache."""

    ops: Ops
    q_proj: QuantLinear
    k_proj: QuantLinear
    v_proj: QuantLinear
    o_proj: QuantLinear
    head_dim: int

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: ForwardBatch, cache: LayerCache) -> Tensor:
        q = self.q_proj(x, batch.lora).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x, batch.lora).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x, batch.lora).unflatten(-1, (-1, self.head_dim))
        q = self.ops.rope_and_cache(q, k, v, *angles, cache, batch.slot_mapping)
        mixed = self.ops.paged_attention(q, cache, batch.sequences, self.head_dim**-0.5)
        return self.o_proj(mixed.flatten(-2), batch.lora)


@dataclass(frozen=True)
class MLP:
    """SwiGLU."""

    ops: Ops
    gate_proj: QuantLinear
    up_proj: QuantLinear
    down_proj: QuantLinear

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        gate, up = self.gate_proj(x, batch.lora), self.up_proj(x, batch.lora)
        return self.down_proj(self.ops.silu_mul(gate, up), batch.lora)


@dataclass(frozen=True)
class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    input_layernorm: RMSNorm
    attention: Attention
    post_attention_layernorm: RMSNorm
    mlp: MLP

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: ForwardBatch, cache: LayerCache) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), angles, batch, cache)
        return x + self.mlp(self.post_attention_layernorm(x), batch)

    def weights(self) -> LayerWeights:
        attention, mlp = self.attention, self.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        return LayerWeights(
            self.input_layernorm.weight,
            tuple(p.weight for p in (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
            self.post_attention_layernorm.weight,
        )


class LlamaModel:
    """One base model, its weights in the provider's form.

    `lora_targets` maps each projection to its (in, out) features; a projection's position there is the `module`
    number that `Ops.linear` and `LoraTable.pairs` use.
    """

    def __init__(self, config: LlamaConfig, weights: WeightSource, ops: Ops) -> None:
        """Take every weight from `weights`, one at a time, so that no two are held in two forms at once."""
        self.config = config
        self.ops = ops
        self.lora_targets: dict[str, tuple[int, int]] = {}
        self.weights_bytes = 0
        self._embedding = self._tensor(weights, "embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._layers = [self._decoder_layer(weights, i) for i in range(config.num_layers)]
        self._norm = self._rms_norm(weights, "norm.weight")
        self._lm_head = self._head(weights)
        self._rotary = Rotary(config, ops.device)
        layers = [layer.weights() for layer in self._layers]
        self._fused = ops.fuse(layers, head_dim=config.head_dim, eps=config.rms_norm_eps)

    @property
    def is_fused(self) -> bool:
        """Whether the provider runs all layers as one op."""
        return self._fused is not None

    def forward(self, batch: ForwardBatch, kv: PagedKVCache) -> Tensor:
        """float32 logits [r, vocab] of the batch's `logit_rows`; K and V of all its rows are written to `kv`."""
        return self.logits(self.hidden(batch, kv)[batch.logit_rows])

    def hidden(self, batch: ForwardBatch, kv: PagedKVCache) -> Tensor:
        """What the last layer leaves [rows, hidden], for `logits`; K and V of all rows are written to `kv`."""
        x = self.ops.embedding(batch.token_ids, self._embedding)
        angles = self._rotary(batch.positions)
        caches = [kv.layer(index) for index in range(self.config.num_layers)]
        if self._fused is not None:
            x = self._fused(x, *angles, caches, batch.slot_mapping, batch.sequences, batch.lora)
        else:
            for layer, cache in zip(self._layers, caches, strict=True):
                x = layer(x, angles, batch, cache)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [r, vocab] of rows of `hidden`. A row takes 4 · vocab bytes: ask for few at a time."""
        return self.ops.lm_head(self._norm(hidden), self._lm_head)

    def _decoder_layer(self, weights: WeightSource, index: int) -> DecoderLayer:
        config, ops, prefix = self.config, self.ops, f"layers.{index}"
        biased = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}
        linear = {
            name.split(".")[1]: self._linear(weights, f"{prefix}.{name}", shape, biased[name.split(".")[0]])
            for name, shape in projection_shapes(config).items()
        }
        return DecoderLayer(
            self._rms_norm(weights, f"{prefix}.input_layernorm.weight"),
            Attention(ops, linear["q_proj"], linear["k_proj"], linear["v_proj"], linear["o_proj"], config.head_dim),
            self._rms_norm(weights, f"{prefix}.post_attention_layernorm.weight"),
            MLP(ops, linear["gate_proj"], linear["up_proj"], linear["down_proj"]),
        )

    def _linear(self, weights: WeightSource, name: str, shape: tuple[int, int], biased: bool) -> QuantLinear:
        out_features, in_features = shape
        bias = weights.tensor(f"{name}.bias", (out_features,)).to(self.ops.device) if biased else None
        handle = self.ops.prepare(weights.matrix(f"{name}.weight", shape), bias)
        self.weights_bytes += handle.num_bytes
        self.lora_targets[name] = (in_features, out_features)
        return QuantLinear(self.ops, handle, len(self.lora_targets) - 1)

    def _head(self, weights: WeightSource) -> LinearHandle:
        if not self.config.tie_word_embeddings:
            shape = (self.config.vocab_size, self.config.hidden_size)
            handle = self.ops.prepare(weights.matrix("lm_head.weight", shape), None)
            self.weights_bytes += handle.num_bytes
            return handle
        handle = self.ops.prepare(self._embedding, None)
        if handle.num_bytes != self._embedding.nbytes:  # equal: the provider kept the very tensor, counted already
            self.weights_bytes += handle.num_bytes
        return handle

    def _rms_norm(self, weights: WeightSource, name: str) -> RMSNorm:
        return RMSNorm(self.ops, self._tensor(weights, name, (self.config.hidden_size,)), self.config.rms_norm_eps)

    def _tensor(self, weights: WeightSource, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = weights.tensor(name, shape).to(self.ops.device)
        self.weights_bytes += tensor.nbytes
        return tensor
