"""All decoder layers of a model with the Triton kernels; projections with the same input are one launch.

Launches per layer: norm, [shrink], q|k|v, [norms of heads], rope with the KV write, attention (two launches where
contexts are split), rounding to float16, [shrink], o with the residual, norm, [shrink], gate|up with SwiGLU, rounding
to float16, [shrink], down with the residual. Those in brackets are left out where there is no adapter or norm. The
residual stream stays float32. Nothing here waits for the GPU. Made by `TritonOps.fuse`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guanaco.kernels.layer_cache import LayerCache, Sequences
from guanaco.kernels.lora_batch import LoraBatch
from guanaco.kernels.nf4 import GROUP_SIZE, NESTED_GROUP_SIZE
from guanaco.kernels.ops import HEAD_NORMS, LayerWeights
from guanaco.kernels.triton import elementwise
from guanaco.kernels.triton.products.pack import TritonNf4, merge


@dataclass(frozen=True)
class Merged:
    """Projections that read the same rows, their weights stacked into one matrix."""

    weight: TritonNf4
    bias: Tensor | None  # float32 [n]
    modules: tuple[int, ...]  # LoRA modules of the projections
    part_starts: tuple[int, ...]  # first row of each projection


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Merged
    o: Merged
    head_norms: tuple[Tensor, ...]  # of q and of k; empty where heads are not normalised
    post_norm: Tensor
    gate_up: Merged
    down: Merged


class TritonLayers:
    """The `FusedLayers` of this provider."""

    def __init__(self, ops: Any, layers: Sequence[LayerWeights], *, head_dim: int, eps: float) -> None:
        """ops: the `TritonOps` that made all the handles."""
        self._ops = ops
        self._head_dim = head_dim
        self._eps = eps
        self._layers = [_merged_layer(layer, index) for index, layer in enumerate(layers)]
        first = layers[0].projections
        self._heads, self._kv_heads = (first[name].out_features // head_dim for name in ("q", "k"))
        self._hidden = first["q"].in_features

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[LayerCache],
        slot_mapping: Tensor,
        sequences: Sequences,
        lora: LoraBatch | None,
    ) -> Tensor:
        assert x.shape[1] == self._hidden and len(caches) == len(self._layers), (x.shape, len(caches))
        stream = x.to(torch.float32, copy=True)  # products add to it in place
        if not stream.shape[0]:
            return stream
        operand = self._ops.operand(lora, x.shape[0])
        for layer, cache in zip(self._layers, caches, strict=True):
            q, k, v = self._queries(stream, layer, operand)
            q = self._ops.rope_and_cache(q, k, v, cos, sin, cache, slot_mapping)
            mixed = self._ops.paged_attention(q, cache, sequences, self._head_dim**-0.5)
            self._add(stream, mixed.flatten(1), layer.o, operand)
            rows, _ = elementwise.rms_norm_scaled(stream, layer.post_norm, self._eps)
            active = torch.empty((x.shape[0], layer.down.weight.k), dtype=torch.float32, device=x.device)
            self._product(rows, layer.gate_up, operand, active, epilogue="silu_mul")
            self._add(stream, active, layer.down, operand)
        return stream

    def _queries(self, stream: Tensor, layer: _Layer, operand: Any) -> list[Tensor]:
        """q, k and v, [t, heads, head_dim] each; slices of one tensor where heads are not normalised."""
        rows, _ = elementwise.rms_norm_scaled(stream, layer.input_norm, self._eps)
        y = torch.empty((stream.shape[0], layer.qkv.weight.n), dtype=self._ops.dtype, device=stream.device)
        self._product(rows, layer.qkv, operand, y)
        heads = y.unflatten(1, (-1, self._head_dim))
        parts = list(heads.split((self._heads, self._kv_heads, self._kv_heads), dim=1))
        for index, weight in enumerate(layer.head_norms):
            rows = parts[index].reshape(-1, self._head_dim)
            parts[index] = self._ops.rms_norm(rows, weight, self._eps).view(parts[index].shape)
        return parts

    def _add(self, stream: Tensor, x: Tensor, merged: Merged, operand: Any) -> None:
        """stream += x · Wᵀ + bias + LoRA."""
        self._product(elementwise.scale_rows(x), merged, operand, stream, epilogue="add", residual=stream)

    def _product(self, rows: elementwise.ScaledRows, merged: Merged, operand: Any, y: Tensor, **epilogue: Any) -> None:
        step = self._ops.shrink(rows, operand, merged.modules, merged.part_starts)
        self._ops.product(rows, merged.weight, y, bias=merged.bias, lora=step, **epilogue)


def _merged_layer(layer: LayerWeights, index: int) -> _Layer:
    handles: list[Any] = list(layer.projections.values())

    def merged(first: int, stop: int) -> Merged:
        return _merge(handles[first:stop], len(handles) * index + first)

    head_norms = tuple(layer.norms[name] for name in HEAD_NORMS if name in layer.norms)
    norms = layer.norms
    return _Layer(
        norms["input"], merged(0, 3), merged(3, 4), head_norms, norms["post_attention"], merged(4, 6), merged(6, 7)
    )


def _merge(handles: Sequence[Any], first_module: int) -> Merged:
    """Stack the handles' weights into one matrix, and replace each handle's weight by a view of its rows."""
    starts = [0]
    for handle in handles:
        starts.append(starts[-1] + handle.out_features)
    weight = handles[0].weight
    if len(handles) > 1:
        weight = merge([handle.weight for handle in handles])
        for handle, start, stop in zip(handles, starts, starts[1:], strict=False):
            handle.weight = rows_of(weight, start, stop)
    bias = None
    if any(handle.bias is not None for handle in handles):
        zeros = torch.zeros(starts[-1], dtype=torch.float32, device=weight.words.device)
        for handle, start, stop in zip(handles, starts, starts[1:], strict=False):
            if handle.bias is not None:
                zeros[start:stop] = handle.bias
        bias = zeros
    modules = tuple(range(first_module, first_module + len(handles)))
    return Merged(weight, bias, modules, tuple(starts[:-1]))


def rows_of(weight: TritonNf4, start: int, stop: int) -> TritonNf4:
    """Rows start … stop − 1 as a view. With double quantisation, row `start` must begin a whole group of 256 scales, as
    the parts of a `merge` do."""
    first, last = (row * weight.k // GROUP_SIZE for row in (start, stop))
    nested = None
    if weight.nested is not None:
        assert first % NESTED_GROUP_SIZE == 0, (start, weight.k)
        nested = weight.nested[first // NESTED_GROUP_SIZE : -(-last // NESTED_GROUP_SIZE)]
    return TritonNf4(weight.words[start:stop], weight.absmax[first:last], nested, weight.map)
