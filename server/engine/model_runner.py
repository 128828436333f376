"""One scheduled step → tensors → forward pass → sampled tokens.

Knows where things are (adapter slots, KV slots), not why: that was the scheduler's. The only part of the engine, with
the sampler, that touches tensors. Called by the engine, on its thread.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from guanaco.adapters.registry import AdapterRegistry
from guanaco.adapters.slot_store import SlotStore
from guanaco.kernels.layer_cache import Sequences
from guanaco.kernels.lora_batch import LoraBatch, LoraTable
from guanaco.models.forward_batch import ForwardBatch
from guanaco.models.kv_cache import PagedKVCache
from guanaco.models.llama import LlamaModel
from guanaco.server.engine.request import SampledToken, ScheduledBatch, ScheduledSequence, TokenLogprob
from guanaco.server.engine.sampler import SamplingRow, sample, token_logprobs


@dataclass(frozen=True)
class StepRows:
    """One step as plain lists: over tokens, over sequences, or over the rows whose logits are wanted."""

    token_ids: list[int]
    positions: list[int]
    slot_mapping: list[int]
    block_tables: list[list[int]]  # per sequence, unpadded
    context_lens: list[int]  # per sequence
    ends: list[int]  # [sequences + 1]
    logit_rows: list[int]
    row_adapters: list[tuple[tuple[int, float], ...]]  # per token: (adapter slot, factor) entries


class DecodePath(Protocol):
    """Another way to run steps in which every sequence computes one token and is sampled: CUDA graphs."""

    max_rows: int

    def forward(self, rows: StepRows, table: LoraTable) -> Tensor:
        """float32 logits [sequences, vocab], good until the next call."""


class ModelRunner:
    """One base model, its KV cache and its adapter slots."""

    def __init__(
        self,
        model: LlamaModel,
        kv: PagedKVCache,
        adapters: AdapterRegistry,
        slots: SlotStore,
        eos_ids: frozenset[int],
        decode_path: DecodePath | None = None,
    ) -> None:
        self._decode_path = decode_path
        self._model = model
        self._kv = kv
        self._adapters = adapters
        self._slots = slots
        self._eos_ids = eos_ids
        self._device = model.ops.device

    def load_adapter(self, slot: int, version: str) -> None:
        """Put an adapter version into an adapter slot."""
        self._slots.load(slot, self._adapters.host_copy(version))

    def clear_adapter(self, slot: int) -> None:
        """Empty an adapter slot."""
        self._slots.clear(slot)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        """One result per scheduled sequence; `begin` is called before the forward pass. Writes K and V again if it is
        run again; nothing else is changed."""
        scored = [_scored_positions(item) for item in batch.sequences]
        logits = self._forward(batch, scored, begin)
        drawn = iter(self._draw(batch, logits, scored))
        results, first = [], 0
        for item, positions in zip(batch.sequences, scored, strict=True):
            token = next(drawn) if item.needs_sample else SampledToken(None)
            if positions:
                found = _prompt_logprobs(item, logits[first : first + len(positions)], positions)
                token = replace(token, prompt_logprobs=found)
            first += len(positions) + item.needs_sample
            if item.needs_sample and item.sequence.request.params.return_logits:
                token = replace(token, logits=logits[first - 1].float().cpu().numpy().tobytes())
            results.append(token)
        return tuple(results)

    @torch.inference_mode()
    def probe(self) -> None:
        """A forward pass of one token of nobody: without adapters, and without writing to the cache. Its numbers mean
        nothing (it reads whatever block 0 holds); what counts is whether it raises."""
        zero = self._tensor([0], torch.int64)
        batch = ForwardBatch(
            token_ids=zero,
            positions=zero,
            slot_mapping=zero - 1,
            sequences=self._sequences([[0]], [1], [0, 1]),
            logit_rows=zero,
            lora=None,
        )
        self._model.forward(batch, self._kv)

    def _draw(self, batch: ScheduledBatch, logits: Tensor, scored: list[range]) -> list[SampledToken]:
        """The next token of each sequence that needs one: its row of logits is the last of its own."""
        indexes, rows, end = [], [], 0
        for item, positions in zip(batch.sequences, scored, strict=True):
            end += len(positions) + item.needs_sample
            if item.needs_sample:
                request = item.sequence.request
                output_ids = item.sequence.token_ids[item.sequence.num_prompt_tokens :]
                indexes.append(end - 1)
                rows.append(SamplingRow(request.params, request.prompt_token_ids, output_ids))
        return sample(logits if len(rows) == len(logits) else logits[indexes], rows, self._eos_ids, self._model.ops)

    def _forward(self, batch: ScheduledBatch, scored: list[range], begin: Callable[[], None]) -> Tensor:
        rows = self._step_rows(batch, scored)
        path = self._decode_path
        decodes = all(item.num_new_tokens == 1 and item.needs_sample for item in batch.sequences)
        if path is not None and decodes and not any(scored) and len(batch.sequences) <= path.max_rows:
            begin()
            return path.forward(rows, self._slots.table)
        forward_batch = self._forward_batch(rows)
        begin()
        return self._model.forward(forward_batch, self._kv)

    def _step_rows(self, batch: ScheduledBatch, scored: list[range]) -> StepRows:
        size = self._kv.block_size
        rows = StepRows([], [], [], [], [], [0], [], [])
        for item, prompt_positions in zip(batch.sequences, scored, strict=True):
            sequence = item.sequence
            start, stop = sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_new_tokens
            wanted = [*prompt_positions, stop - 1] if item.needs_sample else prompt_positions
            rows.logit_rows.extend(rows.ends[-1] + position - start for position in wanted)
            rows.token_ids.extend(sequence.token_ids[start:stop])
            rows.positions.extend(range(start, stop))
            rows.slot_mapping.extend(sequence.block_table[p // size] * size + p % size for p in range(start, stop))
            rows.block_tables.append(sequence.block_table[: -(-stop // size)])
            rows.context_lens.append(stop)
            rows.ends.append(rows.ends[-1] + item.num_new_tokens)
            entries = tuple((batch.adapter_slots[ref.version], ref.scale) for ref in sequence.request.loras)
            rows.row_adapters.extend([entries] * item.num_new_tokens)
        return rows

    def _forward_batch(self, rows: StepRows) -> ForwardBatch:
        lora = None
        if any(rows.row_adapters):
            lora = LoraBatch.build(rows.row_adapters, self._slots.table, self._device)
        return ForwardBatch(
            token_ids=self._tensor(rows.token_ids, torch.int64),
            positions=self._tensor(rows.positions, torch.int64),
            slot_mapping=self._tensor(rows.slot_mapping, torch.int64),
            sequences=self._sequences(rows.block_tables, rows.context_lens, rows.ends),
            logit_rows=self._tensor(rows.logit_rows, torch.int64),
            lora=lora,
        )

    def _sequences(self, block_tables: list[list[int]], context_lens: list[int], ends: list[int]) -> Sequences:
        num_blocks = max((len(table) for table in block_tables), default=0)
        padded = [table + [0] * (num_blocks - len(table)) for table in block_tables]
        return Sequences(
            self._tensor(padded, torch.int32).view(len(padded), num_blocks),
            self._tensor(context_lens, torch.int32),
            self._tensor(ends, torch.int32),
        )

    def _tensor(self, values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _scored_positions(item: ScheduledSequence) -> range:
    """The prompt's positions whose logits are wanted for `prompt_logprobs`: each predicts the prompt token after it,
    and was not reported yet (a preempted sequence computes its prompt again)."""
    sequence = item.sequence
    if sequence.request.params.prompt_logprobs is None:
        return range(0)
    start, stop = sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_new_tokens
    return range(max(start, sequence.num_prompt_logprobs), min(stop, sequence.num_prompt_tokens - 1))


def _prompt_logprobs(item: ScheduledSequence, logits: Tensor, positions: range) -> tuple[TokenLogprob, ...]:
    num_top = item.sequence.request.params.prompt_logprobs or 0
    predicted = [item.sequence.token_ids[position + 1] for position in positions]
    return tuple(token_logprobs(logits, predicted, [num_top] * len(predicted)))
