"""Contract of the optional op that runs all decoder layers at once; a provider without one leaves them to the model.

Knows nothing of how layers are named or loaded. Built by `models.llama`, implemented by the `cpu` provider.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from guanaco.kernels.lora_batch import LoraBatch

# Projections of a layer in the order of LayerWeights: projection j of layer i is LoRA module MODULES_PER_LAYER · i + j.
MODULES_PER_LAYER = 7


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: x + o(attention(q, k, v of norm(x))), then x + down(SiLU(gate) · up of norm(x))."""

    input_norm: Tensor  # [hidden]
    projections: tuple[object, ...]  # handles of `Ops.prepare`: q, k, v, o, gate, up, down
    post_norm: Tensor  # [hidden]


class FusedLayers(Protocol):
    """All layers of one model; the provider holds their weights."""

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        slot_mapping: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        lora: LoraBatch | None,
    ) -> Tensor:
        """[t, hidden] → [t, hidden]; caches: one (k, v) pair per layer, written and read. Shapes as in `Ops`."""
