"""Serves generating requests; shared by all routes that generate.

Read the body → parse, validate and tokenise it on a worker thread → submit it → answer, streamed or whole. Each route
gives the first and the last part: how a body becomes engine requests, and what its answer looks like.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.answer import Answer
from guanaco.server.api.generation.answer_size import most_tokens_a_choice
from guanaco.server.api.generation.body import parse_object, read_body, renamed_errors
from guanaco.server.api.generation.catalog import Caller, Catalog, ServedModel
from guanaco.server.api.generation.choices import Generation, until_disconnect
from guanaco.server.api.generation.encode import encode
from guanaco.server.api.generation.ignored import Ignored
from guanaco.server.api.generation.protocol import GenerationBody, TokenizeBody
from guanaco.server.api.generation.sampling import context_exceeded, for_choice
from guanaco.server.api.generation.sse import stream_generation
from guanaco.server.api.generation.state import ApiState, encoded_response, state_of
from guanaco.server.api.http.access_log import record_of
from guanaco.server.api.http.auth import ApiKey
from guanaco.server.api.http.errors import ApiError, bad_request, overloaded
from guanaco.server.api.http.fair_pool import FairPool, Lane
from guanaco.server.api.http.lifecycle import Admission, Lifecycle
from guanaco.server.api.tools.plan import ToolPlan
from guanaco.server.api.values.adapters import NumberedAdapter
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.engine.constraints import Constraint
from guanaco.server.engine.request import Request, SamplingParams
from guanaco.server.grammars.errors import GrammarError, GrammarUnavailable
from guanaco.server.grammars.requested import FIELDS as STRUCTURE_FIELDS
from guanaco.server.grammars.requested import requested
from guanaco.server.grammars.spec import Grammar

# Common tokens of all known vocabularies are shorter. A text with more bytes than this times the context's tokens can't
# fit, so it is refused before it is tokenised.
MAX_BYTES_PER_TOKEN = 64
SMALL_BODY_BYTES = 16 << 10  # up to this size, a body is parsed on the event loop
SPLIT_KEY_HEADER = "X-Split-Key"
MAX_SPLIT_KEY_CHARS = 256


@dataclass(frozen=True)
class Prompt:
    """One prompt: token ids for the engine, and the client's text (for echo)."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    text: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A valid request, ready for the engine."""

    body: GenerationBody
    model: ServedModel
    prompts: tuple[Prompt, ...]
    cache_salt: str
    ignored: Ignored
    grammar: Grammar | None = None  # the grammar that every choice's text must follow
    tools: ToolPlan = field(default_factory=ToolPlan)
    names: Mapping[str, str] = field(default_factory=dict)  # chat's field name → the client's, if they differ
    keeps_stream: bool = False  # a stream's output is kept until its end, which repeats it

    @property
    def stream(self) -> bool:
        return bool(self.body.stream)

    def shortened(self, max_tokens: int) -> "Prepared":
        """A copy with at most `max_tokens` for each choice."""
        params = [replace(p.params, max_tokens=min(p.params.max_tokens, max_tokens)) for p in self.prompts]
        prompts = [replace(prompt, params=its) for prompt, its in zip(self.prompts, params, strict=True)]
        return replace(self, prompts=tuple(prompts))

    def engine_requests(
        self, answer_id: str, arrival_seconds: float, new_constraint: Callable[[SamplingParams], Constraint | None]
    ) -> list[Request]:
        """The engine's requests, one for each choice of each prompt, in the order of the choices' indexes. Each gets a
        constraint of its own."""
        choices = [(prompt, choice) for prompt in self.prompts for choice in range(self.body.num_drawn)]
        return [
            Request(
                request_id=f"{answer_id}-{index}",
                prompt_token_ids=prompt.token_ids,
                params=for_choice(prompt.params, choice),
                loras=self.model.loras,
                cache_salt=self.cache_salt,
                arrival_seconds=arrival_seconds,
                constraint=new_constraint(prompt.params),
            )
            for index, (prompt, choice) in enumerate(choices)
        ]


Prepare = Callable[[ApiState, Caller, dict[str, Any], Admission], tuple[Prepared, Answer]]


async def serve(request: HttpRequest, prepare: Prepare) -> Response:
    """Answer one request. Failures before the first output are raised; `errors` turns them into HTTP errors."""
    state, record = state_of(request), record_of(request.scope)
    with state.intake.body(key_of(request)) as held:
        body = await read_body(request, state.settings.max_body_bytes, held)
        record.started = awake_seconds()  # the client's upload is not our latency
        admission = state.admit()
        try:
            prepared, answer = await _prepare(request, body, prepare, admission)
            with renamed_errors(prepared.names):
                new_constraint = await _constraints(request, prepared)
        except BaseException:
            admission.release()
            raise
        del body
    try:
        state.metrics.count_ignored_fields(prepared.ignored.count)
        record.model, record.adapter_version = prepared.model.name, prepared.model.versions
        record.stream = prepared.stream
        requests = prepared.engine_requests(answer.id, record.started, new_constraint)
        generation = await Generation.start(state, prepared.model, record, admission, requests, prepared.body.num_drawn)
    except BaseException:
        admission.release()
        raise
    answer.start(generation)
    if prepared.stream:
        response = await stream_generation(request, generation, answer)
        _add_headers(response, prepared)
        return response
    try:
        await until_disconnect(request.receive, _collect(generation, answer))
        answer.end()
        if answer.is_large:
            content = await state.answer_work.run(state.lane(key_of(request)), answer.encoded)
        else:
            content = answer.encoded()
    finally:
        await generation.aclose()
        answer.close()
    response = encoded_response(content)
    _add_headers(response, prepared)
    return response


async def _prepare(
    request: HttpRequest, body: bytes, prepare: Prepare, admission: Admission
) -> tuple[Prepared, Answer]:
    state, caller = state_of(request), caller_of(request)
    data = await parse(state.preparation, state.lane(caller.key, is_large=True), body)
    lane = state.lane(caller.key, data.get("model"), is_large=len(body) > SMALL_BODY_BYTES)
    prepared, answer = await state.preparation.run(lane, prepare, state, caller, data, admission)
    sizes = [(len(prompt.token_ids), prompt.params) for prompt in prepared.prompts]
    with renamed_errors(prepared.names):
        keeps = prepared.keeps_stream or not prepared.stream
        most = most_tokens_a_choice(prepared.body, sizes, state.settings, keeps=keeps)
    return prepared if most is None else prepared.shortened(most), answer


async def _constraints(request: HttpRequest, prepared: Prepared) -> Callable[[SamplingParams], Constraint | None]:
    """A function that makes the constraint of each choice. The grammar is compiled here, on a thread, since that may
    take seconds."""
    state, grammar = state_of(request), prepared.grammar
    if grammar is None:
        return lambda _params: None
    if prepared.body.allowed_token_ids is not None:
        text = "allowed_token_ids can't be with a demand on the answer's text: there could be no token left to draw"
        raise bad_request(text, "allowed_token_ids", ErrorCode.INVALID_GRAMMAR)
    key = key_of(request)
    try:
        if (compiled := state.grammars.ready(grammar)) is None:
            with state.intake.grammar(key):
                async with asyncio.timeout(state.settings.queue_timeout or None):
                    lane = state.lane(key, prepared.body.model)
                    compiled = await state.grammar_work.run(lane, state.grammars.compile, grammar)
    except TimeoutError:
        raise overloaded() from None
    except GrammarError as error:
        raise _bad_grammar(error) from None
    except GrammarUnavailable as error:
        status = 503 if error.is_here else 501
        raise ApiError(status, ErrorCode.GRAMMAR_UNAVAILABLE, str(error), param=grammar.param) from None
    return lambda params: compiled.matcher(state.ends_of(params))


def grammar_of(body: GenerationBody) -> Grammar | None:
    """The grammar that the body's fields set for the answer's text; None if they set none. Raises a 400 if they are
    wrong, or if two fields set one. Tools may add to it: see `ToolPlan.grammar`."""
    try:
        return requested({name: getattr(body, name) for name in STRUCTURE_FIELDS})
    except GrammarError as error:
        raise _bad_grammar(error) from None


def _bad_grammar(error: GrammarError) -> ApiError:
    return bad_request(
        str(error) if error.param is None else f"{error.param}: {error}", error.param, ErrorCode.INVALID_GRAMMAR
    )


Work = Callable[[ApiState, Caller, dict[str, Any]], tuple[dict[str, Any], Ignored]]


async def serve_tokens(request: HttpRequest, work: Work) -> Response:
    """Answer one request that only tokenises. It gets a place before its body is read; keys and models take turns."""
    state, key = state_of(request), key_of(request)
    with state.intake.token_request(key), state.intake.body(key) as held:
        body = await read_body(request, state.settings.max_body_bytes, held)
        caller = caller_of(request)
        data = await parse(state.token_work, state.lane(key, is_large=True), body)
        lane = state.lane(key, data.get("model"), is_large=len(body) > SMALL_BODY_BYTES)
        answer, ignored = await state.token_work.run(lane, _encoded, work, state, caller, data)
    state.metrics.count_ignored_fields(ignored.count)
    response = encoded_response(answer)
    ignored.name_in(response)
    return response


def _encoded(work: Work, state: ApiState, caller: Caller, data: dict[str, Any]) -> tuple[bytes, Ignored]:
    answer, ignored = work(state, caller, data)
    return encode(answer), ignored


async def parse(pool: FairPool, lane: Lane, body: bytes) -> dict[str, Any]:
    """The body as a JSON object. A small body is parsed on the event loop, which is faster than starting on a
    thread."""
    if len(body) <= SMALL_BODY_BYTES:
        return parse_object(body)
    return await pool.run(lane, parse_object, body)


def key_of(request: HttpRequest) -> ApiKey | None:
    key: ApiKey | None = request.scope.get("guanaco.key")
    return key


def caller_of(request: HttpRequest) -> Caller:
    """The sender of a request. A weighted alias chooses by X-Split-Key, else by `user`, else by the request's id.

    Raises a 400 if X-Split-Key is empty or too long.
    """
    split_key = request.headers.get(SPLIT_KEY_HEADER)
    if split_key is not None and not 1 <= len(split_key) <= MAX_SPLIT_KEY_CHARS:
        raise bad_request(f"{SPLIT_KEY_HEADER} must have 1 to {MAX_SPLIT_KEY_CHARS} characters", SPLIT_KEY_HEADER)
    return Caller(key_of(request), split_key, record_of(request.scope).request_id)


async def _collect(generation: Generation, answer: Answer) -> None:
    async for index, output in generation:
        answer.add(index, output)


def _add_headers(response: Response, prepared: Prepared) -> None:
    """Set the headers with the adapters' versions and with the request's ignored fields."""
    if prepared.model.versions is not None:
        response.headers["X-Adapter-Version"] = prepared.model.versions
    prepared.ignored.name_in(response)


def acquire_model(
    state: ApiState, body: GenerationBody | TokenizeBody, caller: Caller, admission: Admission
) -> ServedModel:
    """The model or adapters that the request names, held until its end. Raises a 404 for an unknown name, and a 400 if
    fields contradict each other."""
    catalog, key = state.catalog, caller.key
    name = catalog.base.name if body.model is None else body.model
    behind = name.removeprefix(catalog.base.name + ":")
    if behind != name and not catalog.is_known(name, key):
        name = behind if behind != catalog.base.name else name  # SGLang's base:adapter
    if caller.split_key is None and body.user is not None:
        caller = replace(caller, split_key=body.user)
    asked = [field for field in ("adapters", *_PEERS_FIELDS) if getattr(body, field) not in (None, ())]
    asked += ["lora"] if body.lora == () else []
    if len(asked) > 1:
        raise bad_request(f"{asked[0]} and {asked[1]} both name adapters: give one of them", asked[1])
    if asked in (["lora_path"], ["adapter_id"]):
        return _acquire_named(catalog, name, asked[0], getattr(body, asked[0]), caller, admission)
    mixture = [(choice.name, choice.scale) for choice in body.adapters]
    if body.lora is not None:
        if name != catalog.base.name:
            raise bad_request(f"with lora, model must be the base, {catalog.base.name}", "lora")
        mixture = _numbered_adapters(catalog, body.lora, key)
    if not mixture:
        return catalog.acquire(name, caller, admission)
    most = state.settings.adapter_slots
    if len(mixture) > most:
        raise bad_request(f"at most {most} adapters at once (--adapter-slots)", asked[0])
    return catalog.acquire_mixture(name, mixture, caller, admission)


_PEERS_FIELDS = ("adapter_id", "lora_path", "lora")


def _acquire_named(
    catalog: Catalog, model: str, field: str, name: str, caller: Caller, admission: Admission
) -> ServedModel:
    """The adapter named in `field`. Raises a 400 if `model` names another one."""
    if model not in (catalog.base.name, name):
        raise bad_request(f"model and {field} name two models: with {field}, model must be the base", field)
    if name == catalog.base.name:
        raise bad_request(f"{field} must name an adapter: the base is none", field)
    try:
        return catalog.acquire(name, caller, admission)
    except ApiError as error:
        if error.code != ErrorCode.MODEL_NOT_FOUND:
            raise
        text = f"no adapter has the name in {field}; GET /v1/models lists the names (a path is none)"
        raise ApiError(error.status, ErrorCode.ADAPTER_NOT_FOUND, text, param=field) from None


def _numbered_adapters(
    catalog: Catalog, numbered: Sequence[NumberedAdapter], key: ApiKey | None
) -> list[tuple[str, float]]:
    """llama.cpp's list of numbers as (name, scale). An adapter with scale 0 is left out."""
    names = catalog.numbered_adapters(key)
    if len({entry.id for entry in numbered}) != len(numbered):
        raise bad_request("lora has an id twice", "lora")
    for index, entry in enumerate(numbered):
        if entry.id not in names:
            text = f"no adapter has the id in lora[{index}]; GET /lora-adapters lists them"
            raise ApiError(404, ErrorCode.ADAPTER_NOT_FOUND, text, param=f"lora[{index}].id")
    return [(names[entry.id], entry.scale) for entry in numbered if entry.scale]


def model_to_look_at(state: ApiState, body: GenerationBody | TokenizeBody, caller: Caller) -> ServedModel:
    """The model that these fields name, for requests that generate nothing: it is neither held nor counted."""
    lease = Admission(Lifecycle())
    try:
        return acquire_model(state, body, replace(caller, counts=False), lease)
    finally:
        lease.release()


def check_token_ids(state: ApiState, token_ids: Sequence[int], param: str) -> None:
    """Raise a 400 for a prompt with a token id for which the model has no embedding row."""
    if max(token_ids, default=0) >= state.num_token_ids:
        text = f"a token of the prompt is beyond the model's vocabulary: token ids must be below {state.num_token_ids}"
        raise bad_request(text, param)


def encode_raw(state: ApiState, text: str, add_special_tokens: bool | None, max_tokens: int) -> list[int]:
    """The token ids of a raw prompt. Control tokens in it are read as such, unless --literal-prompts is set.
    max_tokens: a text with more tokens is cut; the result still has more than `max_tokens` ids."""
    return state.tokenizer.encode(
        text,
        add_bos=False if add_special_tokens is False else None,
        parse_control=not state.settings.literal_prompts,
        max_tokens=max_tokens,
    )


def check_text_size(num_bytes: int, max_model_len: int, param: str) -> None:
    """Raise a 400 for a text so long that it must have more tokens than the context."""
    if num_bytes > max_model_len * MAX_BYTES_PER_TOKEN:
        raise context_exceeded(num_bytes // MAX_BYTES_PER_TOKEN, max_model_len, param)
