"""The messages of the engine: what the API hands it, what it hands back, its own record of a request, and its bounds.

Plain data, no torch: the scheduler and its simulator run on these in milliseconds.
"""

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple

from guanaco.adapters.residency.messages import AddVersion, ForgetVersion, ReadDone
from guanaco.adapters.residency.moves import Moves
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.constraints import AllowedTokens, Constraint


class FinishReason(StrEnum):
    STOP = "stop"  # an eos id, a stop token id or a stop string
    LENGTH = "length"  # max_tokens, or the room in the context
    ABORT = "abort"  # the client left, or an operator ended it
    ERROR = "error"  # ours: `error` says what


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Everything is validated by the API before it gets here."""

    max_tokens: int  # 0: none; the prompt is computed, and scored where prompt_logprobs are asked for
    temperature: float = 1.0  # 0: argmax
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None  # None: the engine draws one
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: AllowedTokens | None = None  # None: all ids may be drawn
    bad_words: tuple[tuple[int, ...], ...] = ()  # ids: behind all but the last of one, the last is not drawn
    logprobs: int | None = None  # None: none; n: the token's own and the n most likely
    prompt_logprobs: int | None = None  # the same for the prompt's tokens (`echo` with `logprobs`)
    stop_token_ids: frozenset[int] = frozenset()  # in addition to the model's eos ids
    # Stop tokens that the client named by their text: (id, text). Their ids are in `stop_token_ids`, too.
    stop_token_texts: tuple[tuple[int, str], ...] = ()
    stop_strings: tuple[str, ...] = ()
    stops_see_control: bool = False  # stop strings are searched for in a text that has control tokens, too
    include_stop_str: bool = False
    min_tokens: int = 0  # no eos, stop id or stop string before
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    hidden_token_ids: frozenset[int] = frozenset()  # no text, although control tokens are shown
    return_logits: bool = False  # of the first token drawn, raw: the engine's own probes want them


@dataclass(frozen=True)
class LoraRef:
    """One adapter of a request: an immutable version (content digest), and the request's own factor."""

    version: str
    scale: float = 1.0


@dataclass(frozen=True)
class Request:
    """What the API hands the engine: token ids, never text."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    loras: tuple[LoraRef, ...] = ()  # empty: the base model
    cache_salt: str = ""  # prefix-cache tenant: requests of different salts never share a block
    arrival_seconds: float = 0.0  # monotonic clock; the queue deadline counts from here
    background: bool = False  # goes after everybody else's, within a bound: the engine's own probes
    constraint: Constraint | None = None  # on its tokens: this request's own, as it keeps the place in its text

    @property
    def versions(self) -> tuple[str, ...]:
        """Of its adapters; none for the base model."""
        return tuple(lora.version for lora in self.loras)


@dataclass(frozen=True)
class Submit:
    """A request to queue."""

    request: Request


@dataclass(frozen=True)
class Abort:
    """A request to end now. An unknown id means nothing: the request may just have finished."""

    request_id: str


Message = Submit | Abort | AddVersion | ForgetVersion | ReadDone  # from the event loop to the engine


@dataclass(frozen=True, eq=False, slots=True)  # equal content is `block_manager`'s business: chains are long
class BlockContent:
    """What a full KV block holds: its tokens, after everything that comes before them."""

    parent: "BlockContent | None"  # the block before it; None: `token_ids` is empty, and this is a namespace's root
    token_ids: tuple[int, ...]
    namespace: tuple[str, tuple[tuple[str, float], ...]]  # tenant salt, ordered (adapter version, scale)
    digest: bytes


class Status(Enum):
    LOADING = "loading"  # waits for its adapters to be read into memory
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)  # two records are never the same one, however alike
class Sequence:
    """The engine's mutable record of one request. `num_computed_tokens` chases `num_tokens`: there are no phases."""

    request: Request
    token_ids: list[int]  # prompt, then output
    arrival_number: int = 0  # 0, 1, 2 … in order of arrival: who goes first, and who is preempted last
    arrival_step: int = 0  # the step before which it came
    last_turn: int = 0  # of all that anybody had in a step, counted: its last
    block_table: list[int] = field(default_factory=list)
    block_contents: list[BlockContent] = field(default_factory=list)  # the namespace, then each full block so far
    num_findable_blocks: int = 0  # of the block table's first ones, how many were offered to the prefix cache
    num_computed_tokens: int = 0  # positions whose K and V are in the cache
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when it was first let in
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    queue_seconds: float | None = None  # from its arrival to its first step
    num_passed_over: int = 0  # steps in which a younger one could go first, for want of room for its adapters
    holds_adapters: bool = False  # in host memory: its versions are there or being read, and stay
    num_prompt_logprobs: int = 0  # of the prompt's positions, how many have been reported

    def __post_init__(self) -> None:
        self.versions = self.request.versions  # of its adapters; looked at in every step, as the next one
        self.generates = self.request.params.max_tokens > 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def draws_after(self, num_new: int) -> bool:
        """Whether a token is to be drawn once the next `num_new` positions are computed."""
        return self.generates and self.num_computed_tokens + num_new == len(self.token_ids)

    @property
    def is_all_scored(self) -> bool:
        """Whether it was only to be computed, and is."""
        return not self.generates and self.num_computed_tokens == len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)


class ScheduledSequence(NamedTuple):  # made for every sequence in every step: a dataclass takes four times as long
    """A sequence's share of one step: positions num_computed_tokens … + num_new_tokens − 1."""

    sequence: Sequence
    num_new_tokens: int
    needs_sample: bool  # the last of these tokens is the newest known one, and another is wanted: draw the next


@dataclass(frozen=True)
class ScheduledBatch:
    """One step, decided. `adapter_slots` maps each adapter version of the step to its place on the device;
    `moves` must be made before the forward pass, in order."""

    sequences: tuple[ScheduledSequence, ...]
    adapter_slots: dict[str, int]
    moves: Moves

    @property
    def num_tokens(self) -> int:
        return sum(s.num_new_tokens for s in self.sequences)


@dataclass(frozen=True)
class TokenLogprob:
    """log-probabilities of one position, from the raw logits (before penalties and temperature), natural log."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first
    rank: int = 0  # of the token among all, 1 for the likeliest; 0: it was not asked for


@dataclass(frozen=True)
class SampledToken:
    """What the model runner returns for one scheduled sequence. `error` ends that sequence only (NaN logits, say)."""

    token_id: int | None  # None where nothing was to be sampled
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: ErrorCode | None = None
    logits: bytes | None = None  # float32 [vocab], where they were asked for


class TokenOutput(NamedTuple):  # made for every sequence in every step, too
    """What one step did for one request. Exactly one output per request has a finish_reason, and it is the last."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that matched; None for eos and the rest
    error: ErrorCode | None = None
    num_cached_tokens: int = 0
    queue_seconds: float | None = None  # from the request's arrival to its first step
    logits: bytes | None = None
    ends_in_text: bool = False  # of an end by `stop`: its last token is text, since a constraint was complete with it


@dataclass(frozen=True)
class StepStats:
    """What metrics see of a step."""

    num_running: int
    num_waiting: int
    num_scheduled_tokens: int
    num_preempted: int
    kv_usage_ratio: float
    prefix_queries_tokens: int  # prompt tokens looked up in the prefix cache in this step
    prefix_hits_tokens: int
    step_seconds: float
    running_adapters: tuple[str, ...]  # versions
    waiting_adapters: tuple[str, ...]
    sequence_versions: tuple[tuple[str, ...], ...] = ()  # of each running sequence: its adapters' versions


@dataclass(frozen=True)
class StepOutput:
    outputs: tuple[TokenOutput, ...]
    stats: StepStats


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
