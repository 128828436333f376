"""A decoder: embed; per layer attention and MLP on normalised input, each added back; logits.

`LayerSpec` lists what a layer holds; a function, which an architecture may replace, makes a layer of it. Knows no
requests, adapters or files: rows come in a `ForwardBatch`, keys and values are in a `PagedKVCache`, weights come one by
one from a `WeightSource`. Built by `registry`, run by the model runner.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from guanaco.kernels import FusedLayers, LayerWeights, LinearHandle, Ops, PackedWeight
from guanaco.kernels.layer_cache import LayerCache
from guanaco.kernels.nf4 import Nf4Weight
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.forward_batch import ForwardBatch
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.architectures.layer_spec import LayerSpec, Projection
from guanaco.models.architectures.layers import QuantLinear, RMSNorm, Rotary


class WeightSource(Protocol):
    """Where weights come from. Each weight is read once, in the order of `DecoderModel.__init__`. Names are Hugging
    Face's without the leading `model.`. Raises ModelError for a tensor that is missing or has another shape."""

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | PackedWeight | Tensor:
        """The [out, in] weight of a linear layer, a projection or the head."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Any other tensor: embedding, norm, bias."""


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention with rotary positions over a paged cache."""

    ops: Ops
    q_proj: QuantLinear
    k_proj: QuantLinear
    v_proj: QuantLinear
    o_proj: QuantLinear
    head_dim: int
    q_norm: RMSNorm | None = None  # of each head, before the rotation
    k_norm: RMSNorm | None = None

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: ForwardBatch, cache: LayerCache) -> Tensor:
        q = self.q_proj(x, batch.lora).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x, batch.lora).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x, batch.lora).unflatten(-1, (-1, self.head_dim))
        q, k = _each_head(self.q_norm, q), _each_head(self.k_norm, k)
        q = self.ops.rope_and_cache(q, k, v, *angles, cache, batch.slot_mapping)
        mixed = self.ops.paged_attention(q, cache, batch.sequences, self.head_dim**-0.5)
        return self.o_proj(mixed.flatten(-2), batch.lora)


def _each_head(norm: RMSNorm | None, x: Tensor) -> Tensor:
    """x [t, heads, head_dim] with each head normalised; x itself if there is no norm."""
    return x if norm is None else norm(x.flatten(0, 1)).view(x.shape)


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
        """The layer's weights in the form that providers can fuse."""
        attention, mlp = self.attention, self.mlp
        projections = {
            "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": attention.o_proj,
            "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj,
        }  # fmt: skip
        norms = {
            "input": self.input_layernorm, "post_attention": self.post_attention_layernorm,
            "q": attention.q_norm, "k": attention.k_norm,
        }  # fmt: skip
        return LayerWeights(
            {name: projection.weight for name, projection in projections.items()},
            {name: norm.weight for name, norm in norms.items() if norm is not None},
        )


class Layer(Protocol):
    """A decoder layer, [t, hidden] → [t, hidden]; K and V of its rows are written to `cache`."""

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: ForwardBatch, cache: LayerCache) -> Tensor: ...

    def weights(self) -> LayerWeights | None:
        """Its weights for a provider that fuses layers. None: `LayerWeights` cannot describe what it computes."""


@dataclass(frozen=True)
class LayerParts:
    """The weights of one layer, by the names in its `LayerSpec`."""

    config: ModelConfig
    ops: Ops
    linears: Mapping[str, QuantLinear]
    norms: Mapping[str, RMSNorm]

    def attention(self) -> Attention:
        """LLaMA's attention, with norms of heads where the layer has them."""
        q, k, v, o = (self.linears[f"self_attn.{name}_proj"] for name in "qkvo")
        norms = (self.norms.get(f"self_attn.{name}_norm") for name in "qk")
        return Attention(self.ops, q, k, v, o, self.config.head_dim, *norms)

    def mlp(self) -> MLP:
        """LLaMA's MLP."""
        return MLP(self.ops, *(self.linears[f"mlp.{name}_proj"] for name in ("gate", "up", "down")))


MakeLayer = Callable[[LayerParts], Layer]


def decoder_layer(parts: LayerParts) -> Layer:
    """LLaMA's layer of these parts."""
    norms = parts.norms
    return DecoderLayer(norms["input_layernorm"], parts.attention(), norms["post_attention_layernorm"], parts.mlp())


class DecoderModel:
    """One base model, its weights in the provider's form.

    `lora_targets` maps each projection to its (in, out) features; a projection's position there is the `module`
    number that `Ops.linear` and `LoraTable.pairs` use. `linears` and `tensors` are the weights by Hugging Face's names
    without the leading `model.`: linear layers (`lm_head` among them) in the provider's form, and embedding, norms and
    biases.
    """

    def __init__(
        self, config: ModelConfig, weights: WeightSource, ops: Ops, spec: LayerSpec, make_layer: MakeLayer
    ) -> None:
        """Take every weight from `weights`, one at a time, so that at most one is in memory in two forms."""
        self.config = config
        self.ops = ops
        self.lora_targets: dict[str, tuple[int, int]] = {}
        self.linears: dict[str, LinearHandle] = {}
        self.tensors: dict[str, Tensor] = {}
        self.weights_bytes = 0
        self._embedding = self._tensor(weights, "embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._layers = [make_layer(self._parts(weights, spec, i)) for i in range(config.num_layers)]
        self._norm = self._rms_norm(weights, "norm.weight", config.hidden_size)
        self._lm_head = self.linears["lm_head"] = self._head(weights)
        self._rotary = Rotary(config, ops.device)
        self._fused: FusedLayers | None = None
        described = [parts for layer in self._layers if (parts := layer.weights()) is not None]
        if len(described) == len(self._layers):
            self._fused = ops.fuse(described, head_dim=config.head_dim, eps=config.rms_norm_eps)

    @property
    def is_fused(self) -> bool:
        """Whether the provider runs all layers as one op."""
        return self._fused is not None

    def forward(self, batch: ForwardBatch, kv: PagedKVCache) -> Tensor:
        """float32 logits [r, vocab] of the batch's `logit_rows`; K and V of all its rows are written to `kv`."""
        return self.logits(self.hidden(batch, kv)[batch.logit_rows])

    def hidden(self, batch: ForwardBatch, kv: PagedKVCache) -> Tensor:
        """The last layer's output [t, hidden], for `logits`. K and V of all rows are written to `kv`."""
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
        """float32 logits [r, vocab] of `hidden` [r, hidden]. A row takes 4 · vocab bytes, so pass few rows at a
        time."""
        return self.ops.lm_head(self._norm(hidden), self._lm_head)

    def _parts(self, weights: WeightSource, spec: LayerSpec, index: int) -> LayerParts:
        prefix = f"layers.{index}"
        linears = {one.name: self._linear(weights, f"{prefix}.{one.name}", one) for one in spec.projections}
        norms = {one.name: self._rms_norm(weights, f"{prefix}.{one.name}.weight", one.size) for one in spec.norms}
        return LayerParts(self.config, self.ops, linears, norms)

    def _linear(self, weights: WeightSource, name: str, spec: Projection) -> QuantLinear:
        out_features, in_features = spec.shape
        bias = weights.tensor(f"{name}.bias", (out_features,)).to(self.ops.device) if spec.has_bias else None
        handle = self.ops.prepare(weights.matrix(f"{name}.weight", spec.shape), bias)
        self.weights_bytes += handle.num_bytes
        self.linears[name] = handle
        if bias is not None:
            self.tensors[f"{name}.bias"] = bias
        self.lora_targets[name] = (in_features, out_features)
        return QuantLinear(self.ops, handle, len(self.lora_targets) - 1)

    def _head(self, weights: WeightSource) -> LinearHandle:
        if not self.config.tie_word_embeddings:
            shape = (self.config.vocab_size, self.config.hidden_size)
            handle = self.ops.prepare(weights.matrix("lm_head.weight", shape), None)
            self.weights_bytes += handle.num_bytes
            return handle
        handle = self.ops.prepare(self._embedding, None)
        if handle.num_bytes != self._embedding.nbytes:  # if equal, the provider shares the embedding's memory
            self.weights_bytes += handle.num_bytes
        return handle

    def _rms_norm(self, weights: WeightSource, name: str, size: int) -> RMSNorm:
        return RMSNorm(self.ops, self._tensor(weights, name, (size,)), self.config.rms_norm_eps)

    def _tensor(self, weights: WeightSource, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = weights.tensor(name, shape).to(self.ops.device)
        self.weights_bytes += tensor.nbytes
        self.tensors[name] = tensor
        return tensor
