"""The CSR of rows and adapter slots, and its grouped view."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guanaco.kernels.lora_batch import LoraBatch, LoraTable

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([1.0, 0.25])), max_size=3).map(tuple), max_size=9)
)
def test_both_views_hold_the_same_entries(rows: list[tuple[tuple[int, float], ...]]) -> None:
    batch = LoraBatch.build(rows, LoraTable({}), CPU)
    offsets = batch.row_offsets.tolist()
    assert batch.row_offsets.dtype == batch.slots.dtype == torch.int32
    assert batch.scales.dtype == torch.float32
    csr = [tuple(zip(batch.slots[a:b].tolist(), batch.scales[a:b].tolist(), strict=True)) for a, b in pairwise(offsets)]
    assert csr == rows
    grouped = sorted(
        (row, slot, scale)
        for slot, (indices, scales) in batch.rows_by_slot.items()
        for row, scale in zip(indices.tolist(), scales.tolist(), strict=True)
    )
    assert grouped == sorted((row, slot, scale) for row, entries in enumerate(rows) for slot, scale in entries)
    assert list(batch.rows_by_slot) == sorted(batch.rows_by_slot)
