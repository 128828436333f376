"""Every op in plain PyTorch: the specification that the other providers are compared with.

Each op sums in float32 and rounds once, at its end, to the activations' dtype. It runs on any torch device. Knows
nothing of requests, adapter names or layers. Chosen by `load_ops("reference", …)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from guanaco.kernels.layer_cache import CODE_LIMITS, LayerCache, Sequences, decoded, quantise_heads
from guanaco.kernels.lora_batch import LoraBatch, LoraPair
from guanaco.kernels.nf4 import Nf4Weight
from guanaco.kernels.ops import Draw, LayerWeights, LinearHandle, PackedWeight

# How many numbers of a weight that isn't kept decoded are decoded at a time: 16 MiB of float32.
TILE_WEIGHTS = 4 << 20
# The most scores (queries × heads × positions) of a prompt in memory at a time, and the most elements of K for a batch
# of decoding sequences: 32 MiB of float32. A single query or a single sequence may exceed it.
ATTENTION_SCORES = 8 << 20
GATHERED_KEYS = 8 << 20
# The most padding in a batch of decoding sequences, as a fraction of its longest context.
MAX_PADDING_RATIO = 0.25


@dataclass(frozen=True)
class ReferenceLinear:
    """A linear layer's weight: packed NF4, or dense. A dense one is float32 (decoded once, or stored so) or has its
    stored 16-bit dtype."""

    weight: Nf4Weight | Tensor
    bias: Tensor | None  # float32 [out]
    in_features: int
    out_features: int
    num_bytes: int

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 in float32."""
        if isinstance(self.weight, Nf4Weight):
            return self.weight.dequantize_rows(start, stop)
        return self.weight[start:stop].float()


class ReferenceOps:
    """The ops on `device`, activations in `dtype`. See `Ops` for shapes."""

    name = "reference"
    packed_format = ""
    cache_dtypes = tuple(CODE_LIMITS)

    def __init__(self, *, device: torch.device, dtype: torch.dtype, decoded_weights_bytes: int) -> None:
        assert dtype in (torch.float32, torch.bfloat16), dtype
        self.device = device
        self.dtype = dtype
        self.decoded_weights_bytes = decoded_weights_bytes
        self.decoded_bytes_used = 0

    def pack(self, weight: Nf4Weight) -> Nf4Weight:
        return weight

    def prepare(self, weight: Nf4Weight | PackedWeight | Tensor, bias: Tensor | None) -> ReferenceLinear:
        """Keep the weight decoded to float32 while the memory budget has room for it, else keep it as stored."""
        assert not isinstance(weight, PackedWeight), "a weight of another provider"
        out_features, in_features = weight.shape
        stored = weight.to(self.device)
        decoded_bytes = out_features * in_features * 4
        is_decoded = isinstance(stored, Tensor) and stored.dtype == torch.float32
        if not is_decoded and self.decoded_bytes_used + decoded_bytes <= self.decoded_weights_bytes:
            stored = stored.dequantize() if isinstance(stored, Nf4Weight) else stored.float()
            self.decoded_bytes_used += decoded_bytes
        bias32 = None if bias is None else bias.to(self.device, torch.float32)
        num_bytes = stored.num_bytes if isinstance(stored, Nf4Weight) else stored.numel() * stored.element_size()
        num_bytes += 0 if bias32 is None else bias32.numel() * 4
        return ReferenceLinear(stored, bias32, in_features, out_features, num_bytes)

    def decode_rows(self, weight: LinearHandle, start: int, stop: int, out: Tensor) -> None:
        assert isinstance(weight, ReferenceLinear), "a handle of another provider"
        out.copy_(weight.rows(start, stop))

    def place_adapter(self, pairs: Sequence[LoraPair]) -> list[LoraPair]:
        return [LoraPair(pair.a.to(self.device), pair.b.to(self.device), pair.scale) for pair in pairs]

    def linear(self, x: Tensor, weight: LinearHandle, lora: LoraBatch | None, module: int) -> Tensor:
        x32 = x.float()
        y = self._product(x32, weight)
        if lora is not None:
            for slot, (rows, factors) in lora.rows_by_slot.items():
                pair = lora.table.pairs.get((module, slot))
                if pair is None:
                    continue
                delta = (x32[rows] @ pair.a.float().t()) @ pair.b.float().t()
                y.index_add_(0, rows, delta * (factors * pair.scale).view(-1, 1))
        return y.to(self.dtype)

    def lm_head(self, x: Tensor, weight: LinearHandle) -> Tensor:
        return self._product(x.float(), weight)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int] | None:  # noqa: ARG002
        return None

    def fuse(self, layers: Sequence[LayerWeights], *, head_dim: int, eps: float) -> None:
        """None: each op is already many calls into torch, so fusing would gain nothing."""

    def _product(self, x32: Tensor, handle: LinearHandle) -> Tensor:
        """float32 [t, out]: x32 · Wᵀ + bias. If W isn't kept in float32, a tile of its rows is decoded at a time."""
        assert isinstance(handle, ReferenceLinear), "a handle of another provider"
        if isinstance(handle.weight, Tensor) and handle.weight.dtype == torch.float32:
            y = x32 @ handle.weight.t()
        else:
            y = torch.empty((x32.shape[0], handle.out_features), dtype=torch.float32, device=x32.device)
            step = max(1, TILE_WEIGHTS // handle.in_features)
            for start in range(0, handle.out_features, step):
                stop = min(start + step, handle.out_features)
                y[:, start:stop] = x32 @ handle.rows(start, stop).t()
        return y if handle.bias is None else y.add_(handle.bias)

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return table[token_ids].to(self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        inverse = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
        return (x32 * inverse * weight.float()).to(self.dtype)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return (F.silu(gate.float()) * up.float()).to(self.dtype)

    def rope_and_cache(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, slot_mapping: Tensor
    ) -> Tensor:
        tokens = (slot_mapping >= 0).nonzero().view(-1)
        slots = slot_mapping[tokens]
        block, offset = slots // cache.block_size, slots % cache.block_size
        for x, stored, scales in ((_rotate(k, cos, sin), cache.k, cache.k_scales), (v, cache.v, cache.v_scales)):
            written = x[tokens]
            if scales is not None:
                written, scales[block, :, offset] = quantise_heads(written.float(), stored.dtype)
            stored[block, offset] = written.to(stored.dtype)
        return _rotate(q, cos, sin).to(self.dtype)

    def paged_attention(self, q: Tensor, cache: LayerCache, sequences: Sequences, scale: float) -> Tensor:
        out = torch.empty_like(q)
        contexts, starts = sequences.context_lens.tolist(), sequences.cu_seqlens_q.tolist()
        new = [stop - start for start, stop in pairwise(starts)]
        heads = q.shape[1]

        def gather(indexes: list[int], length: int) -> tuple[Tensor, Tensor]:
            """Keys and values of the sequences `indexes`, padded to `length` positions."""
            blocks = sequences.block_tables[indexes, : -(-length // cache.block_size)]
            keys = _gather(cache.k, cache.k_scales, blocks, length)
            return keys, _gather(cache.v, cache.v_scales, blocks, length)

        max_positions = GATHERED_KEYS // (cache.k.shape[2] * cache.k.shape[3])
        for group in _decode_groups([(contexts[i], i) for i, n in enumerate(new) if n == 1], max_positions):
            rows = [starts[i] for i in group]
            limits = sequences.context_lens[group].view(-1, 1)
            keys, values = gather(group, contexts[group[-1]])
            # Unwritten positions may hold NaN, and 0 · NaN is NaN, so a weight of zero alone doesn't hide a value.
            padding = torch.arange(keys.shape[2], device=q.device) >= limits
            values.masked_fill_(padding.unsqueeze(-1), 0.0)
            out[rows] = _attend(q[rows].unsqueeze(1).float(), keys, values, limits, scale).squeeze(1).to(self.dtype)

        for i in (i for i, n in enumerate(new) if n > 1):
            keys, values = gather([i], contexts[i])
            step = max(1, ATTENTION_SCORES // (heads * contexts[i]))
            for first in range(0, new[i], step):
                last = min(first + step, new[i])
                rows32 = q[starts[i] + first : starts[i] + last].unsqueeze(0).float()
                seen = contexts[i] - new[i] + last  # positions that the last of these queries sees
                limits = torch.arange(seen - (last - first) + 1, seen + 1, device=q.device).view(1, -1)
                result = _attend(rows32, keys[:, :, :seen], values[:, :, :seen], limits, scale)
                out[starts[i] + first : starts[i] + last] = result.squeeze(0).to(self.dtype)
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of each head of x [t, heads, head_dim] by the angles of its token, in
    float32."""
    low, high = x.float().chunk(2, dim=-1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * c - high * s, high * c + low * s), dim=-1)


def _gather(stored: Tensor, scales: Tensor | None, blocks: Tensor, length: int) -> Tensor:
    """float32 [kv_heads, sequences, length, head_dim] in new memory, read from blocks [sequences, blocks]."""
    ids = blocks.reshape(-1)
    chosen = stored.flatten(1).index_select(0, ids).view(-1, *stored.shape[1:])
    rows = decoded(chosen, None if scales is None else scales.index_select(0, ids))
    rows = rows.view(len(blocks), -1, *stored.shape[2:])
    return rows[:, :length].permute(2, 0, 1, 3).contiguous()


def _decode_groups(sequences: list[tuple[int, int]], max_positions: int) -> list[list[int]]:
    """Split (context length, index) pairs into batches of similar length, in ascending order, so that padding stays
    small.

    max_positions: the most positions of a batch, padding included. A longer sequence gets a batch of its own.
    """
    groups: list[list[int]] = []
    shortest = 0
    for length, index in sorted(sequences):
        group = groups[-1] if groups else []
        fits = (len(group) + 1) * length <= max_positions
        if group and fits and length * (1 - MAX_PADDING_RATIO) <= shortest:
            group.append(index)
        else:
            groups.append([index])
            shortest = length
    return groups


def _attend(q: Tensor, keys: Tensor, values: Tensor, limits: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v in float32. Query (g, j) sees the first limits[g, j] positions.

    q [g, n, heads, head_dim]; keys, values [kv_heads, g, length, head_dim]; limits [g, n] → [g, n, heads, head_dim].
    """
    g, n, heads, head_dim = q.shape
    kv_heads, share = keys.shape[0], heads // keys.shape[0]
    hidden = torch.arange(keys.shape[2], device=q.device) >= limits.repeat_interleave(share, dim=1).unsqueeze(-1)
    q = q.view(g, n, kv_heads, share, head_dim).permute(2, 0, 1, 3, 4).reshape(kv_heads, g, n * share, head_dim)
    scores = (q * scale) @ keys.transpose(2, 3)  # [kv_heads, g, n · share, length]
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
    out = (weights @ values).view(kv_heads, g, n, share, head_dim)
    return out.permute(1, 2, 0, 3, 4).reshape(g, n, heads, head_dim)
