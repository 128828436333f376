"""The operand of one forward pass. Built by the model runner, read by the model; knows nothing of requests."""

from dataclasses import dataclass

from torch import Tensor

from guanaco.kernels.layer_cache import Sequences
from guanaco.kernels.lora_batch import LoraBatch


@dataclass(frozen=True)
class ForwardBatch:
    """One forward pass. `t` runs over all tokens of all sequences, flattened; `s` over sequences."""

    token_ids: Tensor  # int64 [t]
    positions: Tensor  # int64 [t]          0-based, per sequence
    slot_mapping: Tensor  # int64 [t]       KV slot = block_id * block_size + offset
    sequences: Sequences  # block tables, context lengths, first rows
    logit_rows: Tensor  # int64 [r]         rows of t whose logits are wanted
    lora: LoraBatch | None  # None: no row in this batch has an adapter
