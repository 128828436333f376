"""Decode steps of the `triton` provider as CUDA graphs: one launch in place of several hundred.

A graph is made when a step first needs it, for a bucket of batch sizes. Everything that differs from step to step is
data in fixed buffers, filled on the host and copied at once: tokens, block tables, adapter slots and factors. Rows that
pad a bucket write nowhere and have no adapter. Capture and replay (`CudaCapture`) have NEVER RUN on a GPU. Everything
else here is tested without one, with `RunEagerly`. Called by the model runner, in place of the eager forward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from guanaco.kernels.layer_cache import Sequences
from guanaco.kernels.lora_batch import LoraBatch, LoraTable
from guanaco.kernels.triton.ops import TritonOps
from guanaco.kernels.triton.products.lora import rank_bucket
from guanaco.models.architectures.decoder import DecoderModel
from guanaco.models.architectures.forward_batch import ForwardBatch
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.server.engine.model_runner import StepRows

_WARM_UPS = 2  # runs before a capture
_ALIGNMENT = 16  # bytes: where each buffer in the block may begin


class Capture(Protocol):
    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function that repeats the work of `run`, on the same memory."""


class RunEagerly:
    """Makes no graph: the function that it returns is `run` itself."""

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return run


class CudaCapture:
    """Captures the work as a CUDA graph. All graphs share one memory pool. NEVER RUN on a GPU so far."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Capture demands warm-ups on a stream of its own: Triton compiles its kernels, and cuBLAS plans its products.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": another thread may ask the GPU for its free memory meanwhile, which must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = run()
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


@dataclass(frozen=True)
class _Shape:
    """The sizes that one graph is made for; its steps differ in data only."""

    rows: int
    active: int = 0  # how many adapters the step may use
    max_rank: int = 0  # the largest rank of these adapters, rounded up to a rank bucket
    aligned: bool = False  # as `TritonLora.aligned`


@dataclass(eq=False)
class _Buffers:
    """Named tensors in one block on the device, and the same in host memory (pinned where there is a GPU)."""

    device: torch.device
    host: Tensor = field(init=False)
    block: Tensor = field(init=False)
    arrays: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def allocate(self, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        spans, end = {}, 0
        for name, (dtype, shape) in layout.items():
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            spans[name] = (end, end + num_bytes)
            end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.host = torch.zeros(end, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self.block = torch.zeros(end, dtype=torch.uint8, device=self.device)
        for name, (dtype, shape) in layout.items():
            start, stop = spans[name]
            self.arrays[name] = self.host[start:stop].view(dtype).view(shape).numpy()
            self.tensors[name] = self.block[start:stop].view(dtype).view(shape)

    def upload(self) -> None:
        """Start one copy of all host buffers to the device. It runs beside the caller: do not write to the host buffers
        before work that was launched after this call has been waited for."""
        self.block.copy_(self.host, non_blocking=True)


class DecodeGraphs:
    """All graphs of one model over one KV cache."""

    def __init__(
        self,
        model: DecoderModel,
        ops: TritonOps,
        kv: PagedKVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        num_slots: int,
        capture: Capture,
    ) -> None:
        """max_num_seqs: the most rows of a step. The caller must run larger steps itself."""
        assert model.is_fused, "weights that are not packed are not multiplied on fixed memory"
        self._model, self._ops, self._kv = model, ops, kv
        self.max_rows = max_num_seqs
        self._table_width = -(-max_model_len // kv.block_size)
        self._num_slots = num_slots
        self._capture = capture
        self._graphs: dict[_Shape, tuple[_Buffers, Callable[[], Tensor]]] = {}
        # Graphs hold the tables' addresses, so the tables must not move when the first adapter is loaded.
        ops.tables.reserve(len(model.lora_targets), num_slots)

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def forward(self, rows: StepRows, table: LoraTable) -> Tensor:
        """Returns float32 logits [rows, vocab], which the next call overwrites. Writes K and V."""
        num_rows = len(rows.token_ids)
        active = sorted({slot for entries in rows.row_adapters for slot, _ in entries})
        shape = self._shape(num_rows, active, table)
        if shape not in self._graphs:
            self._graphs[shape] = self._make(shape)
        buffers, replay = self._graphs[shape]
        self._fill(buffers.arrays, rows, active if shape.active else [])
        buffers.upload()
        return replay()[:num_rows]

    def _shape(self, num_rows: int, active: list[int], table: LoraTable) -> _Shape:
        bucket = min(_power_of_two(num_rows), self.max_rows)
        max_rank, aligned = self._ops.tables.refresh(table, active)
        if max_rank == 0:
            return _Shape(bucket)
        return _Shape(bucket, min(_power_of_two(len(active)), self._num_slots), rank_bucket(max_rank), aligned)

    def _make(self, shape: _Shape) -> tuple[_Buffers, Callable[[], Tensor]]:
        buffers = _Buffers(self._ops.device)
        rows, ints = (shape.rows,), torch.int32
        buffers.allocate(
            {
                **dict.fromkeys(("token_ids", "positions", "slot_mapping", "logit_rows"), (torch.int64, rows)),
                "block_tables": (ints, (shape.rows, self._table_width)),
                "context_lens": (ints, rows),
                "cu_seqlens_q": (ints, (shape.rows + 1,)),
                "active_slots": (ints, (shape.active,)),
                "factors": (torch.float32, (shape.active, shape.rows)),
            }
        )
        # The step that is captured has padding rows only.
        self._fill(buffers.arrays, StepRows([], [], [], [], [], [0], [], []), [])
        buffers.upload()
        tensors = dict(buffers.tensors)
        active_slots, factors = tensors.pop("active_slots"), tensors.pop("factors")
        sequences = Sequences(*(tensors.pop(name) for name in ("block_tables", "context_lens", "cu_seqlens_q")))
        lora = None
        if shape.active:
            operand = self._ops.tables.over(active_slots, factors, shape.max_rank, shape.aligned)
            none = torch.empty(0, dtype=ints, device=self._ops.device)
            lora = LoraBatch(none, none, none.float(), LoraTable({}), {})
        batch = ForwardBatch(**tensors, sequences=sequences, lora=lora)

        def run() -> Tensor:
            if lora is not None:
                self._ops.bind(lora, operand)
            return self._model.forward(batch, self._kv)

        return buffers, self._capture(run)

    def _fill(self, arrays: dict[str, Any], rows: StepRows, active: list[int]) -> None:
        """Write a step into the host's arrays. Padding rows attend to one position of block 0 and are not read."""
        num_rows = len(rows.token_ids)
        for name, padding in (("token_ids", 0), ("positions", 0), ("slot_mapping", -1)):
            arrays[name][:num_rows] = getattr(rows, name)
            arrays[name][num_rows:] = padding
        arrays["context_lens"][:num_rows] = np.asarray(rows.positions, dtype=np.int32) + 1
        arrays["context_lens"][num_rows:] = 1
        arrays["logit_rows"][:] = np.arange(len(arrays["logit_rows"]))
        arrays["cu_seqlens_q"][:] = np.arange(len(arrays["cu_seqlens_q"]))
        arrays["block_tables"][num_rows:, 0] = 0
        for row, blocks in zip(arrays["block_tables"], rows.block_tables, strict=False):
            row[: len(blocks)] = blocks
        arrays["active_slots"][:] = -1
        arrays["active_slots"][: len(active)] = active
        arrays["factors"][:] = 0.0
        if active:
            place = {slot: index for index, slot in enumerate(active)}
            for row, entries in enumerate(rows.row_adapters):
                for slot, factor in entries:
                    arrays["factors"][place[slot], row] += factor


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
