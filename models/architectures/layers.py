"""The parts of a decoder layer: linear layers, norms, rotary embedding.

They know the ops and their own weights, and only pass on sequences, blocks and adapters. Used by `decoder`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from guanaco.kernels import LinearHandle, Ops
from guanaco.kernels.lora_batch import LoraBatch
from guanaco.models.architectures.config import LinearRope, Llama3Rope, ModelConfig


@dataclass(frozen=True)
class QuantLinear:
    """One projection: 4-bit (or dense) weight in the provider's own form, plus its number among the LoRA targets."""

    ops: Ops
    weight: LinearHandle
    module: int

    def __call__(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """[t, in] → [t, out], with the LoRA delta on the rows that have adapters."""
        return self.ops.linear(x, self.weight, lora, self.module)


@dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) · weight."""

    ops: Ops
    weight: Tensor  # [size]: hidden, or head_dim for the norms of heads
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Rotary:
    """Angles of the rotary embedding, computed in float32 in transformers' order: the same bits, with the same rounding
    at high positions."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._frequencies = rope_frequencies(config).to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 [t, head_dim / 2] each, of int64 positions [t]."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        return angles.cos(), angles.sin()


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2], scaling applied."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearRope):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Rope):
        return _llama3_frequencies(plain, scaling)
    return plain


def _llama3_frequencies(plain: Tensor, scaling: Llama3Rope) -> Tensor:
    """Meta's rule for LLaMA 3.1: a frequency is scaled by how many of its wavelengths fit into the original context."""
    turns = scaling.original_max_position_embeddings / (2 * math.pi / plain)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (turns - scaling.low_freq_factor) / span
    between = (1 - smooth) * plain / scaling.factor + smooth * plain
    scaled = torch.where(turns < scaling.low_freq_factor, plain / scaling.factor, between)
    return torch.where(turns > scaling.high_freq_factor, plain, scaled)
