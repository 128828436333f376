"""The numbers of one engine, and of one step: what bounds the scheduler, and what it counts for the metrics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one engine. `max_model_len` tokens of one sequence must fit into the KV cache."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    queue_timeout_seconds: float
    adapter_timeout_seconds: float = 0.0  # that a request waits for adapters that are not in memory; 0: for ever
    num_rows: int | None = None  # embedding rows of the model: every token id is below; None: not checked
    flood_num_seqs: int = 8  # requests of one adapter that make others wait: a flood
    flood_step_tokens: int = 0  # that floods have of each step at most; 0: all that there are


@dataclass
class StepCounts:
    """What one step did, for the metrics."""

    num_preempted: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
