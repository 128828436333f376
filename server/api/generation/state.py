"""`ApiState`: the engine, the tokenizer and everything else that the routes use. `guanaco serve` builds it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from guanaco.models.text.chat_template import ChatTemplate
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.adapters.manager import AdapterManager
from guanaco.server.api.generation.catalog import Catalog, ServedModel
from guanaco.server.api.generation.sampling import SamplingDefaults
from guanaco.server.api.http.auth import ApiKey, KeyRing
from guanaco.server.api.http.errors import overloaded
from guanaco.server.api.http.fair_pool import FairPool, Lane
from guanaco.server.api.http.intake import Intake
from guanaco.server.api.http.lifecycle import Admission, Lifecycle
from guanaco.server.api.tools.formats.registry import control_ids_of_calls
from guanaco.server.config import Settings
from guanaco.server.engine.async_engine import AsyncEngine
from guanaco.server.engine.request import SamplingParams
from guanaco.server.grammars.compiler import GrammarCompiler, GrammarLimits
from guanaco.server.grammars.vocabulary import Vocabulary
from guanaco.server.metrics.server import Metrics
from guanaco.server.training.jobs.service import TrainingService

# Parsing and tokenising run on threads: a body of megabytes must not delay the tokens of all streams. Each kind of work
# has threads of its own, so that it can't hold up another kind.
_PREPARE_THREADS = 2
_TOKEN_THREADS = 1
_ANSWER_THREADS = 1
_GRAMMAR_THREADS = 1


def _no_template(name: str) -> ChatTemplate:
    raise LookupError(name)


@dataclass(frozen=True)
class ApiState:
    """Everything that the HTTP side needs."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    catalog: Catalog
    settings: Settings
    metrics: Metrics
    version: str
    num_rows: int | None = None  # embedding rows of the model; None: as many as the tokenizer has ids
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    keys: KeyRing = field(default_factory=KeyRing)
    admin_keys: KeyRing = field(default_factory=KeyRing)
    adapters: AdapterManager | None = None  # None: adapters can't be changed while the server runs
    training: TrainingService | None = None  # None: nobody may train
    chat_template: ChatTemplate | None = None  # used instead of the tokenizer's own
    named_template: Callable[[str], ChatTemplate] = field(default=_no_template)  # for profiles; raises LookupError
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    runs_on: Mapping[str, str] = field(default_factory=dict)  # the provider and its device, for /health/ready
    eos_ids: frozenset[int] | None = None  # the token ids that end a text; None: the tokenizer's
    # Threads for requests that generate, for /tokenize and /detokenize, for encoding large answers, and for grammars.
    preparation: FairPool = field(default_factory=lambda: FairPool(_PREPARE_THREADS, "guanaco-prepare"))
    token_work: FairPool = field(default_factory=lambda: FairPool(_TOKEN_THREADS, "guanaco-tokens"))
    answer_work: FairPool = field(default_factory=lambda: FairPool(_ANSWER_THREADS, "guanaco-answer"))
    grammar_work: FairPool = field(default_factory=lambda: FairPool(_GRAMMAR_THREADS, "guanaco-grammar"))

    @property
    def num_token_ids(self) -> int:
        """The number of the model's embedding rows. All token ids must be below it."""
        return self.tokenizer.vocab_size if self.num_rows is None else self.num_rows

    @cached_property
    def intake(self) -> Intake:
        return Intake(
            max_token_requests=self.settings.max_token_requests,
            # A key gets half of it, and one body must fit into that.
            max_body_memory=max(self.settings.max_body_memory, 2 * self.settings.max_body_bytes),
            has_keys=bool(self.keys),
            max_queued_grammars=self.settings.max_queued_grammars,
        )

    def lane(self, key: ApiKey | None, model: object = None, *, is_large: bool = False) -> Lane:
        """The lane in which a request waits for a thread: by its key, and within that by its model and size.

        All unknown names share one lane; otherwise a flood of made-up names would get a turn for each. Large bodies
        have lanes of their own, since they occupy a thread for long even if they are refused.
        """
        tenant = None if key is None else key.id
        known = model if isinstance(model, str) and self.catalog.is_known(model, key) else None
        return Lane(tenant, (known, is_large))

    def shut_down_workers(self) -> None:
        for pool in (self.preparation, self.token_work, self.answer_work, self.grammar_work):
            pool.shutdown()
        self.grammars.close()

    def admit(self) -> Admission:
        """A place for one request that will be prepared. Raises a 503 if all places are taken."""
        if self.lifecycle.num_admitted >= self.max_admitted:
            raise overloaded()
        return Admission(self.lifecycle)

    def template_for(self, model: ServedModel) -> ChatTemplate | None:
        """A model's chat template: its profile's, or the operator's, or the tokenizer's own. None: there is none."""
        if model.profile is not None and model.profile.chat_template is not None:
            return self.named_template(model.profile.chat_template)
        return self.chat_template or self.tokenizer.chat_template

    def stops_of(self, model: ServedModel, *, in_text: bool = True) -> tuple[str, ...]:
        """Stop strings of a chat answer besides the client's. in_text False: only those that are control tokens, for an
        answer that follows a grammar, whose text may hold the others."""
        template = self.template_for(model)
        stops = () if template is None else template.stop_strings
        stops = stops if model.profile is None else (*model.profile.stop, *stops)
        return stops if in_text else tuple(stop for stop in stops if self.tokenizer.control_id(stop) is not None)

    @property
    def all_eos_ids(self) -> frozenset[int]:
        """The ids that end a text."""
        return frozenset(self.tokenizer.eos_ids) if self.eos_ids is None else self.eos_ids

    def ends_of(self, params: SamplingParams) -> frozenset[int]:
        """The control tokens that may end a text when its grammar is complete."""
        ends = params.stop_token_ids & self.tokenizer.special_ids
        return ends if params.ignore_eos else ends | self.all_eos_ids

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """The compiler of the grammars that requests set for their answers."""
        settings = self.settings
        limits = GrammarLimits(seconds=settings.grammar_timeout, grammar_bytes=settings.max_grammar_bytes)
        never = self.tokenizer.special_ids | self.all_eos_ids
        marks = control_ids_of_calls(self.tokenizer.control_id) - self.all_eos_ids
        return GrammarCompiler(
            lambda: Vocabulary.of(self.tokenizer.token_bytes, self.num_token_ids, never, marks),
            limits,
            self.metrics.observe_grammar,
        )

    def defaults_for(self, model: ServedModel) -> SamplingDefaults:
        """The sampling defaults of a model, from its profile if it has one."""
        if model.profile is None:
            return self.defaults
        changes: dict[str, Any] = dict(model.profile.sampling)
        return replace(self.defaults, **changes)

    def card_of(self, model: ServedModel) -> dict[str, Any]:
        """The entry in GET /v1/models, with the model's sampling defaults. An alias has none: it may lead each request
        to another adapter."""
        is_alias = model.stands_for not in (None, model.name)
        return {**model.card(), "sampling_defaults": None if is_alias else asdict(self.defaults_for(model))}

    @property
    def max_admitted(self) -> int:
        """The most requests that can run and wait in the engine. It would refuse more."""
        return self.settings.max_num_seqs + self.settings.max_queued_requests


def state_of(request: Request) -> ApiState:
    state: ApiState = request.app.state.api
    return state


def json_response(content: object, status: int = 200) -> Response:
    return encoded_response(orjson.dumps(content), status)


def encoded_response(content: bytes, status: int = 200) -> Response:
    return Response(content, status, media_type="application/json")
