"""One scheduled step → tensors → forward pass → sampled tokens.

Knows where things are (adapter slots, KV slots), not why: that was the scheduler's. The only part of the engine, with
the sampler, that touches tensors. Called by the engine, on its thread.
"""

from dataclasses import replace

import torch
from torch import Tensor

from guanaco.adapters.registry import AdapterRegistry
from guanaco.adapters.slot_store import SlotStore
from guanaco.kernels.lora_batch import LoraBatch
from guanaco.models.forward_batch import ForwardBatch
from guanaco.models.kv_cache import PagedKVCache
from guanaco.models.llama import LlamaModel
from guanaco.server.engine.request import SampledToken, ScheduledBatch, ScheduledSequence, TokenLogprob
from guanaco.server.engine.sampler import SamplingRow, sample, token_logprobs


class ModelRunner:
    """One base model, its KV cache and its adapter slots."""

    def __init__(
        self,
        model: LlamaModel,
        kv: PagedKVCache,
        adapters: AdapterRegistry,
        slots: SlotStore,
        eos_ids: frozenset[int],
    ) -> None:
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
    def run(self, batch: ScheduledBatch) -> tuple[SampledToken, ...]:
        """One result per scheduled sequence. Writes K and V again if it is run again; nothing else is changed."""
        scored = [_scored_positions(item) for item in batch.sequences]
        logits = self._model.forward(self._forward_batch(batch, scored), self._kv)
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
            block_tables=self._tensor([[0]], torch.int32),
            context_lens=self._tensor([1], torch.int32),
            cu_seqlens_q=self._tensor([0, 1], torch.int32),
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

    def _forward_batch(self, batch: ScheduledBatch, scored: list[range]) -> ForwardBatch:
        size = self._kv.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        context_lens, ends, logit_rows = [], [0], []
        for item, prompt_positions in zip(batch.sequences, scored, strict=True):
            sequence = item.sequence
            start, stop = sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_new_tokens
            wanted = [*prompt_positions, stop - 1] if item.needs_sample else prompt_positions
            logit_rows += [ends[-1] + position - start for position in wanted]
            token_ids += sequence.token_ids[start:stop]
            positions += range(start, stop)
            slot_mapping += [sequence.block_table[p // size] * size + p % size for p in range(start, stop)]
            context_lens.append(stop)
            ends.append(ends[-1] + item.num_new_tokens)
        num_blocks = max((-(-length // size) for length in context_lens), default=0)
        tables = [_padded(item.sequence.block_table, num_blocks) for item in batch.sequences]
        return ForwardBatch(
            token_ids=self._tensor(token_ids, torch.int64),
            positions=self._tensor(positions, torch.int64),
            slot_mapping=self._tensor(slot_mapping, torch.int64),
            block_tables=self._tensor(tables, torch.int32).view(len(tables), num_blocks),
            context_lens=self._tensor(context_lens, torch.int32),
            cu_seqlens_q=self._tensor(ends, torch.int32),
            logit_rows=self._tensor(logit_rows, torch.int64),
            lora=self._lora_batch(batch),
        )

    def _lora_batch(self, batch: ScheduledBatch) -> LoraBatch | None:
        if not batch.adapter_slots:
            return None
        row_adapters: list[tuple[tuple[int, float], ...]] = []
        for item in batch.sequences:
            entries = tuple((batch.adapter_slots[ref.version], ref.scale) for ref in item.sequence.request.loras)
            row_adapters += [entries] * item.num_new_tokens
        return LoraBatch.build(row_adapters, self._slots.table, self._device)

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


def _padded(table: list[int], length: int) -> list[int]:
    return table[:length] + [0] * (length - len(table))
