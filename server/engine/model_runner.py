"""One scheduled step → tensors → forward pass → sampled tokens.

The scheduler has decided which adapter slots and KV blocks to use. Only this module, the sampler and the CUDA graphs
touch tensors in the engine. Called by the engine, on its thread.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.kernels.layer_cache import Sequences
from guanaco.kernels.lora_batch import LoraBatch, LoraTable
from guanaco.models.architectures.decoder import DecoderModel
from guanaco.models.architectures.forward_batch import ForwardBatch
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.constraints import MaskFiller, StepMasks
from guanaco.server.engine.request import SampledToken, ScheduledBatch, ScheduledSequence, TokenLogprob
from guanaco.server.engine.sampler import SamplingRow, sample, token_logprobs
from guanaco.server.engine.speculation.verify import verified

# A prompt is scored in pieces whose float32 logits take at most this many bytes. In one piece, a step of 512 tokens
# over a vocabulary of 128,000 would take 262 MB.
_SCORED_LOGITS_BYTES = 32 << 20


@dataclass(frozen=True)
class StepRows:
    """One step as plain lists: one entry per token, per sequence, or per row of logits that is computed."""

    token_ids: list[int]  # per token
    positions: list[int]  # per token: its position in its sequence
    slot_mapping: list[int]  # per token: where its K and V are written, block · block size + offset
    block_tables: list[list[int]]  # per sequence, unpadded
    context_lens: list[int]  # per sequence: positions up to the end of this step
    ends: list[int]  # [sequences + 1]: sequence i has the tokens ends[i] … ends[i + 1] − 1
    logit_rows: list[int]  # per row of logits: the token whose logits these are
    row_adapters: list[tuple[tuple[int, float], ...]]  # per token: (adapter slot, factor) entries


class DecodePath(Protocol):
    """Another way to run steps in which every sequence computes one token and is sampled: `DecodeGraphs`."""

    max_rows: int  # larger steps are not for it

    def forward(self, rows: StepRows, table: LoraTable) -> Tensor:
        """Returns float32 logits [sequences, vocab], which the next call overwrites."""


class ModelRunner:
    """One base model, its KV cache and its adapter slots."""

    def __init__(
        self,
        model: DecoderModel,
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
        self._masks = MaskFiller(model.config.vocab_size)

    def load_adapter(self, slot: int, version: str) -> None:
        """Put an adapter version into an adapter slot."""
        self._slots.load(slot, self._adapters.host_copy(version))

    def clear_adapter(self, slot: int) -> None:
        """Empty an adapter slot."""
        self._slots.clear(slot)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        """Compute a step. Returns one result per scheduled sequence. `begin` is called before the forward pass.

        Running a batch again writes the same K and V again, and changes nothing else.
        """
        scored = [_scored_positions(item) for item in batch.sequences]
        rows = self._step_rows(batch)
        sampled = [item for item in batch.sequences if item.needs_sample]
        pending = self._masks.start([i.sequence.request.constraint for i in sampled], [i.draft for i in sampled])
        try:
            logits, hidden = self._forward(batch, rows, begin, keep_hidden=any(scored))
        finally:
            masks = None if pending is None else pending.join()
        drawn = iter(self._draw(batch, logits, masks))
        results, index = [], 0
        for item, positions, first_row in zip(batch.sequences, scored, rows.ends, strict=False):
            token = verified(item.draft, drawn) if item.needs_sample else SampledToken(None)
            if item.needs_sample and item.sequence.request.params.return_logits:
                token = replace(token, logits=logits[index].float().cpu().numpy().tobytes())
            index += item.needs_sample * (1 + len(item.draft))
            if positions and token.error is None:
                assert hidden is not None
                start = first_row + positions.start - item.sequence.num_computed_tokens
                token = self._score(item, hidden[start : start + len(positions)], positions, token)
            results.append(token)
        return tuple(results)

    def _score(self, item: ScheduledSequence, hidden: Tensor, positions: range, token: SampledToken) -> SampledToken:
        """`token` with the log-probabilities of the prompt tokens that follow `positions`.

        hidden: [len(positions), hidden size], the last layer's output at these positions. Logits are computed for a few
        rows at a time.
        """
        num_top = item.sequence.request.params.prompt_logprobs or 0
        at_once = max(1, _SCORED_LOGITS_BYTES // (4 * self._model.config.vocab_size))
        found: list[TokenLogprob] = []
        for first in range(0, len(positions), at_once):
            logits = self._model.logits(hidden[first : first + at_once])
            if not bool(torch.isfinite(logits.sum(dim=-1)).all()):
                return SampledToken(None, error=ErrorCode.NUMERICAL_ERROR)
            predicted = [item.sequence.token_ids[p + 1] for p in positions[first : first + at_once]]
            found += token_logprobs(logits, predicted, [num_top] * len(predicted), with_ranks=True)
        return replace(token, prompt_logprobs=tuple(found))

    @torch.inference_mode()
    def probe(self, num_rows: int = 1) -> None:
        """Raise if the device cannot compute: run tokens that belong to no request, without adapters.

        It writes nothing to the KV cache and reads whatever block 0 holds, so its numbers mean nothing. num_rows: how
        many tokens, of one sequence; each gets logits.
        """
        rows = self._tensor(list(range(num_rows)), torch.int64)
        batch = ForwardBatch(
            token_ids=torch.zeros_like(rows),
            positions=rows,
            slot_mapping=torch.full_like(rows, -1),
            sequences=self._sequences([[0] * -(-num_rows // self._kv.block_size)], [num_rows], [0, num_rows]),
            logit_rows=rows,
            lora=None,
        )
        self._model.forward(batch, self._kv)

    def _draw(self, batch: ScheduledBatch, logits: Tensor, masks: StepMasks | None) -> list[SampledToken]:
        """Sample the next token of each sequence that needs one, and one after each of its draft tokens, from its rows
        of logits [rows, vocab]. The draft tokens before a row count as written."""
        rows = []
        for item in batch.sequences:
            if item.needs_sample:
                request = item.sequence.request
                output_ids = item.sequence.token_ids[item.sequence.num_prompt_tokens :]
                for length in range(len(item.draft) + 1):
                    written = [*output_ids, *item.draft[:length]] if length else output_ids
                    rows.append(SamplingRow(request.params, request.prompt_token_ids, written))
        return sample(logits, rows, self._eos_ids, self._model.ops, masks)

    def _forward(
        self, batch: ScheduledBatch, rows: StepRows, begin: Callable[[], None], *, keep_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The logits [rows, vocab] to sample from. keep_hidden: also return the last layer's output [tokens, hidden
        size], to score prompts with; otherwise None."""
        path = self._decode_path
        decodes = all(item.num_rows == 1 and item.needs_sample for item in batch.sequences)
        if path is not None and decodes and not keep_hidden and len(batch.sequences) <= path.max_rows:
            begin()
            return path.forward(rows, self._slots.table), None
        forward_batch = self._forward_batch(rows)
        begin()
        if not keep_hidden:
            return self._model.forward(forward_batch, self._kv), None
        hidden = self._model.hidden(forward_batch, self._kv)
        return self._model.logits(hidden[forward_batch.logit_rows]), hidden

    def _step_rows(self, batch: ScheduledBatch) -> StepRows:
        size = self._kv.block_size
        rows = StepRows([], [], [], [], [], [0], [], [])
        for item in batch.sequences:
            sequence = item.sequence
            first_draft = sequence.num_computed_tokens + item.num_new_tokens
            start, stop = sequence.num_computed_tokens, first_draft + len(item.draft)
            if item.needs_sample:
                rows.logit_rows.extend(range(rows.ends[-1] + item.num_new_tokens - 1, rows.ends[-1] + item.num_rows))
            rows.token_ids.extend(sequence.token_ids[start:first_draft])
            rows.token_ids.extend(item.draft)
            rows.positions.extend(range(start, stop))
            rows.slot_mapping.extend(sequence.block_table[p // size] * size + p % size for p in range(start, stop))
            rows.block_tables.append(sequence.block_table[: -(-stop // size)])
            rows.context_lens.append(stop)
            rows.ends.append(rows.ends[-1] + item.num_rows)
            entries = tuple((batch.adapter_slots[ref.version], ref.scale) for ref in sequence.request.loras)
            rows.row_adapters.extend([entries] * item.num_rows)
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
    """The positions of this step whose logits `prompt_logprobs` needs: each predicts the prompt token after it.

    Positions that were reported before are left out: a preempted sequence computes its prompt again.
    """
    sequence = item.sequence
    if sequence.request.params.prompt_logprobs is None:
        return range(0)
    start, stop = sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_new_tokens
    return range(max(start, sequence.num_prompt_logprobs), min(stop, sequence.num_prompt_tokens - 1))
