"""The engine's data: requests and messages to it, its outputs, its own record of a request, and its limits.

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
    LENGTH = "length"  # max_tokens were written, or the context is full
    ABORT = "abort"  # ended by `Abort`: the client left, or its stream had ended already, as after a stop string
    ERROR = "error"  # the request could not be finished; `error` says why


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled, and when the request ends. The API has validated all values."""

    max_tokens: int  # 0: the prompt is only computed, and scored if prompt_logprobs are asked for
    temperature: float = 1.0  # 0: argmax
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None  # None: the engine chooses one at random
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: AllowedTokens | None = None  # None: all ids may be sampled
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that must not follow one another in full
    logprobs: int | None = None  # None: none are reported; n: the sampled token's and those of the n most likely
    prompt_logprobs: int | None = None  # the same for the prompt's tokens (`echo` with `logprobs`)
    stop_token_ids: frozenset[int] = frozenset()  # in addition to the model's eos ids
    # Stop tokens that the client named by their text: (id, text). Their ids are in `stop_token_ids`, too.
    stop_token_texts: tuple[tuple[int, str], ...] = ()
    stop_strings: tuple[str, ...] = ()
    stops_see_control: bool = False  # stop strings are searched for in the text with its control tokens
    include_stop_str: bool = False  # the answer keeps the stop string that ended it
    min_tokens: int = 0  # no eos id, stop token or stop string ends the request before this many tokens
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    hidden_token_ids: frozenset[int] = frozenset()  # left out of the text even if control tokens are shown
    return_logits: bool = False  # return the raw logits of the first token; for the engine's own probes
    speculation: bool = True  # its next tokens may be guessed and verified several at a time; the tokens stay the same


@dataclass(frozen=True)
class LoraRef:
    """One adapter of a request: an immutable version (content digest), and the factor by which its effect is scaled."""

    version: str
    scale: float = 1.0


@dataclass(frozen=True)
class Request:
    """A request as the API hands it to the engine: token ids, never text."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    loras: tuple[LoraRef, ...] = ()  # empty: the base model
    cache_salt: str = ""  # names a tenant of the prefix cache: requests with different salts never share a block
    arrival_seconds: float = 0.0  # monotonic clock; the queue's time limit counts from here
    background: bool = False  # starts after all others, but is not passed over for ever; for the engine's own probes
    constraint: Constraint | None = None  # limits its tokens; never shared, since it keeps its place in the text

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions of its adapters; empty for the base model."""
        return tuple(lora.version for lora in self.loras)


@dataclass(frozen=True)
class Submit:
    """Queue a request."""

    request: Request


@dataclass(frozen=True)
class Abort:
    """End a request now. An unknown id does nothing: the request may just have finished."""

    request_id: str


Message = Submit | Abort | AddVersion | ForgetVersion | ReadDone  # from the event loop to the engine


# Compared by `block_manager.is_same_content`: a generated __eq__ would recurse through the whole chain.
@dataclass(frozen=True, eq=False, slots=True)
class BlockContent:
    """The content of a full KV block: its tokens, and the chain of blocks before it."""

    parent: "BlockContent | None"  # the block before it; None: `token_ids` is empty, and this is a namespace's root
    token_ids: tuple[int, ...]
    namespace: tuple[str, tuple[tuple[str, float], ...]]  # (cache salt, (adapter version, scale) of each adapter)
    digest: bytes  # SHA-256 of the whole chain


class Status(Enum):
    LOADING = "loading"  # waits for its adapters to be read into host memory
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)  # compared by identity
class Sequence:
    """The engine's mutable record of one request. Each step brings `num_computed_tokens` nearer to `num_tokens`; there
    are no separate phases for prompt and output."""

    request: Request
    token_ids: list[int]  # prompt, then output
    arrival_number: int = 0  # 0, 1, 2 … in order of arrival
    arrival_step: int = 0  # how many steps had begun when it arrived
    # When it was last scheduled, by a counter that the scheduler raises for each sequence of each step.
    last_turn: int = 0
    block_table: list[int] = field(default_factory=list)
    block_contents: list[BlockContent] = field(default_factory=list)  # the namespace, then each full block so far
    num_findable_blocks: int = 0  # how many blocks at the table's start were offered to the prefix cache
    num_computed_tokens: int = 0  # positions whose K and V are in the cache
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache held when the sequence first started
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    queue_seconds: float | None = None  # from its arrival to its first step
    # Steps in which later sequences could start before it: its adapters found no room, or it is a background request.
    num_passed_over: int = 0
    holds_adapters: bool = False  # its versions are in host memory or being read, and stay there
    num_prompt_logprobs: int = 0  # how many of the prompt's positions have been reported

    def __post_init__(self) -> None:
        self.versions = self.request.versions  # both are attributes, not properties, since every step reads them
        self.generates = self.request.params.max_tokens > 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def draws_after(self, num_new: int) -> bool:
        """Whether a token is sampled once the next `num_new` positions are computed."""
        return self.generates and self.num_computed_tokens + num_new == len(self.token_ids)

    @property
    def is_all_scored(self) -> bool:
        """Whether the request asks for no output, and its whole prompt is computed."""
        return not self.generates and self.num_computed_tokens == len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)


class ScheduledSequence(NamedTuple):  # made for every sequence in every step; a dataclass takes four times as long
    """A sequence's part in one step: positions num_computed_tokens … num_computed_tokens + num_new_tokens − 1."""

    sequence: Sequence
    num_new_tokens: int
    needs_sample: bool  # the last of these tokens is the sequence's newest, so the next one is sampled
    # Guesses of the tokens after these. Each is computed as a further row, and accepted if the same token is sampled.
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """The rows of the forward pass: its own tokens and its draft."""
        return self.num_new_tokens + len(self.draft)


@dataclass(frozen=True)
class ScheduledBatch:
    """The scheduler's decision for one step. `adapter_slots` maps each adapter version of the step to its adapter slot.
    `moves` must be made before the forward pass, in order."""

    sequences: tuple[ScheduledSequence, ...]
    adapter_slots: dict[str, int]
    moves: Moves

    @property
    def num_tokens(self) -> int:
        """The rows of the step, drafts included."""
        return sum(s.num_rows for s in self.sequences)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one position, from the raw logits (before penalties and temperature), natural logarithm."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first
    rank: int = 0  # the token's rank among all, 1 for the likeliest; 0: not asked for


@dataclass(frozen=True)
class SampledToken:
    """The model runner's result for one scheduled sequence. `error` (NaN logits, say) ends that sequence only."""

    token_id: int | None  # None if nothing was to be sampled
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: ErrorCode | None = None
    logits: bytes | None = None  # float32 [vocab], if they were asked for
    # The tokens after this one, one for each draft token that was right. None of them has an error.
    more: tuple["SampledToken", ...] = ()


class TokenOutput(NamedTuple):  # made for every sequence in every step, too
    """One step's result for one request. Exactly one output per request has a finish_reason: the last one."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that matched; None for all other ends
    error: ErrorCode | None = None
    num_cached_tokens: int = 0
    queue_seconds: float | None = None  # from the request's arrival to its first step
    logits: bytes | None = None  # float32 [vocab], if they were asked for
    ends_in_text: bool = False  # the reason is STOP, but the last token is text: it completed a constraint


class DraftOutcome(NamedTuple):
    """How many draft tokens of one sequence in one step were accepted."""

    versions: tuple[str, ...]  # of its adapters
    num_drafted: int
    num_accepted: int


@dataclass(frozen=True)
class StepStats:
    """One step's numbers, for the metrics."""

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
    drafts: tuple[DraftOutcome, ...] = ()  # of the sequences that had a draft


@dataclass(frozen=True)
class StepOutput:
    outputs: tuple[TokenOutput, ...]
    stats: StepStats


@dataclass(frozen=True)
class Limits:
    """The limits of one engine. The KV cache must have room for one sequence of `max_model_len` tokens."""

    max_num_seqs: int  # sequences that run at once
    max_num_batched_tokens: int  # rows that one step computes, draft tokens included
    max_model_len: int  # tokens of prompt and output together
    queue_timeout_seconds: float  # how long a request may wait for its first step; 0: for ever
    adapter_timeout_seconds: float = 0.0  # how long a request may wait for its adapters to be read; 0: for ever
    num_rows: int | None = None  # the model's embedding rows: token ids must be below; None: not checked
    flood_num_seqs: int = 8  # an adapter with this many open requests floods
    flood_step_tokens: int = 0  # tokens of each step that flooding adapters may use together; 0: no limit


@dataclass
class StepCounts:
    """What the scheduler counted in one step, for `StepStats`."""

    num_preempted: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    drafts: list[DraftOutcome] = field(default_factory=list)

    def add_draft(self, item: ScheduledSequence, num_accepted: int) -> None:
        """Count a draft of which `num_accepted` tokens were accepted."""
        self.drafts.append(DraftOutcome(item.sequence.versions, len(item.draft), num_accepted))
