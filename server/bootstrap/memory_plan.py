"""Decides how memory is divided: once at start, after the weights are loaded. The banner shows it.

Plain arithmetic on sizes; knows nothing of tensors. Used by `runtime` and by `doctor`.
"""

from dataclasses import dataclass

from guanaco.server.errors import CommandError

# The share of free memory, after the weights are loaded, that the KV cache gets if no size is given. Only a quarter,
# because the machine also has other work, and a cache that was filled stays full (the prefix cache keeps it).
AUTO_KV_SHARE = 0.25
# The same share on a GPU, after room for adapters and for a step's tensors. A GPU seldom has other work than a desktop.
GPU_KV_SHARE = 0.9


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is divided. Sizes are in bytes."""

    weights_bytes: int
    adapters_bytes: int  # the most that all adapters together may take, now or later
    kv_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    notes: tuple[str, ...] = ()

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.adapters_bytes + self.kv_bytes


@dataclass(frozen=True)
class KvRequest:
    """The wanted KV cache."""

    block_bytes: int  # of one block, all layers together
    block_size: int  # positions
    kv_bytes: int | None  # None: a share of the free memory
    max_model_len: int | None  # None: the model's own
    model_positions: int  # the model's own max_position_embeddings
    max_num_seqs: int


def plan_memory(
    request: KvRequest,
    *,
    weights_bytes: int,
    adapters_bytes: int,
    free_bytes: int,
    coming_bytes: int = 0,
    share: float = AUTO_KV_SHARE,
) -> MemoryPlan:
    """Fit the KV cache into the size given, or into `share` of `free_bytes` (free after the weights were loaded).

    coming_bytes: how many of the free bytes adapters may take later. If no size is given, these are left free, but not
    more than half of `free_bytes`. weights_bytes, adapters_bytes: only for the plan that is returned.

    Raises CommandError if the request can't be met; the message names the flags that would help.
    """
    length = request.max_model_len or request.model_positions
    if length > request.model_positions:
        raise CommandError(
            f"--max-model-len {length} is more than the {request.model_positions} positions that the model knows"
        )
    for_cache = max(free_bytes - coming_bytes, free_bytes // 2)
    budget = request.kv_bytes if request.kv_bytes is not None else int(for_cache * share)
    useful_blocks = request.max_num_seqs * -(-length // request.block_size)
    num_blocks = min(budget // request.block_bytes, useful_blocks)
    tokens, notes = num_blocks * request.block_size, []
    if num_blocks < 2:
        raise CommandError(
            f"a KV cache of {budget} bytes holds {num_blocks} blocks of {request.block_bytes} bytes: "
            "give more with --kv-cache-memory, or a smaller --block-size"
        )
    if tokens < length and request.max_model_len is not None:
        needed = -(-length // request.block_size) * request.block_bytes
        raise CommandError(
            f"--max-model-len {length} needs a KV cache of {needed} bytes, and {budget} are available: "
            "raise --kv-cache-memory or lower --max-model-len"
        )
    if coming_bytes + num_blocks * request.block_bytes > free_bytes:
        notes.append(
            f"adapters may later take {human_bytes(coming_bytes)} more, and {human_bytes(free_bytes)} are free for "
            "them and the KV cache: lower --adapter-host-memory"
        )
    if tokens < length:
        notes.append(f"max_model_len lowered from {length} to {tokens}: the KV cache holds no more (--kv-cache-memory)")
        length = tokens
    return MemoryPlan(
        weights_bytes=weights_bytes,
        adapters_bytes=adapters_bytes,
        kv_bytes=num_blocks * request.block_bytes,
        num_blocks=num_blocks,
        block_size=request.block_size,
        max_model_len=length,
        notes=tuple(notes),
    )


def human_bytes(count: int) -> str:
    """A size for people: `1.5 GiB`, `12.0 MiB`, `7 B`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
