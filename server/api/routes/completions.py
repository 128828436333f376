"""POST /v1/completions: one or more prompts in, as text or token ids, and their continuations out."""

from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.api.generation import protocol
from guanaco.server.api.generation.answer import ChoicesAnswer
from guanaco.server.api.generation.body import body_schema, take_fields
from guanaco.server.api.generation.catalog import Caller, ServedModel
from guanaco.server.api.generation.logprobs import CompletionLogprobs, prompt_logprobs
from guanaco.server.api.generation.protocol import COMPLETION_FIELDS, CompletionBody
from guanaco.server.api.generation.sampling import check_request, check_scored_size, num_tokens_kept, sampling_params
from guanaco.server.api.generation.serving import (
    Prepared,
    Prompt,
    acquire_model,
    check_text_size,
    check_token_ids,
    encode_raw,
    grammar_of,
    serve,
)
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.errors import bad_request
from guanaco.server.api.http.lifecycle import Admission
from guanaco.server.engine.request import FinishReason, TokenLogprob
from guanaco.server.engine.request_stream import TextOutput

router = APIRouter(tags=["generation"])

_FEW_ECHOED_CHARS = 64 << 10  # echoed prompts up to this length are encoded on the loop


@router.post("/v1/completions", summary="Continue a text", openapi_extra=body_schema(CompletionBody))
async def completions(request: Request) -> Response:
    return await serve(request, prepare_completion)


def prepare_completion(
    state: ApiState, caller: Caller, data: dict[str, Any], admission: Admission
) -> tuple[Prepared, "CompletionAnswer"]:
    """Validate and tokenise. Runs on a worker thread."""
    fields = take_fields(data, COMPLETION_FIELDS)
    body = fields.validate(CompletionBody)
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens: 0 needs echo: without the prompt, the answer would be empty", "max_tokens")
    check_request(body, state.num_token_ids)
    grammar = grammar_of(body)
    model = acquire_model(state, body, caller, admission)
    prompts = tuple(_prompt(state, body, prompt, model, follows_grammar=grammar is not None) for prompt in body.prompt)
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    check_scored_size(body, num_tokens, echoed=body.logprobs if body.echo else None)
    salt = state.keys.cache_salt(caller.key, body.cache_salt)
    prepared = Prepared(body, model, prompts, salt, fields.ignored, grammar)
    return prepared, CompletionAnswer(body, model, state.tokenizer, prompts)


def _prompt(
    state: ApiState, body: CompletionBody, prompt: protocol.Prompt, model: ServedModel, *, follows_grammar: bool
) -> Prompt:
    """One prompt as token ids. Text gets a BOS by the tokenizer's own rule; token ids are used as they are."""
    keep = num_tokens_kept(body, model.max_model_len)
    if isinstance(prompt, str):
        check_text_size(len(prompt.encode()), model.max_model_len, "prompt")
        most = model.max_model_len if keep is None else protocol.MAX_TOKENS
        token_ids = tuple(encode_raw(state, prompt, body.add_special_tokens, most))
        if keep is not None and len(token_ids) > most:
            raise bad_request(f"a prompt comes to more than {most} tokens: send less at once", "prompt")
    else:
        token_ids = prompt
    check_token_ids(state, token_ids, "prompt")
    if not token_ids:
        raise bad_request("a prompt is empty", "prompt")
    is_cut = keep is not None and len(token_ids) > keep
    token_ids = token_ids[-keep:] if keep is not None else token_ids
    params = sampling_params(
        body,
        state.defaults_for(model),
        tokenizer=state.tokenizer,
        limit=body.token_limit,
        default_limit=protocol.DEFAULT_COMPLETION_TOKENS,
        limit_name="max_tokens",
        num_prompt_tokens=len(token_ids),
        max_model_len=model.max_model_len,
        prompt_name="prompt",
        num_logprobs=body.num_logprobs,
        prompt_logprobs=_num_scored(body),
        more_stops=() if body.ignore_eos or follows_grammar or model.profile is None else model.profile.stop,
    )
    text = None
    skip = body.skip_special_tokens is not False
    if body.echo:
        is_whole = isinstance(prompt, str) and not is_cut
        text = str(prompt) if is_whole else state.tokenizer.decode(token_ids, skip_special_tokens=skip)
    return Prompt(token_ids, params, text)


def _num_scored(body: CompletionBody) -> int | None:
    """How many alternatives of each prompt token the client wants, by `prompt_logprobs` or by `logprobs` with `echo`;
    None: the prompt isn't scored."""
    asked = [num for num in (body.prompt_logprobs, body.logprobs if body.echo else None) if num is not None]
    return max(asked, default=None)


@dataclass
class _Choice:
    prompt: Prompt
    logprob_maker: CompletionLogprobs
    pending: list[str] = field(default_factory=list)  # text that no chunk has shown yet; at first the prompt
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ids_shown: bool = False
    prompt_shown: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class CompletionAnswer(ChoicesAnswer):
    """A text completion, chunk by chunk or whole."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(
        self, body: CompletionBody, model: ServedModel, tokenizer: Tokenizer, prompts: tuple[Prompt, ...]
    ) -> None:
        super().__init__(body, model)
        self._tokenizer = tokenizer
        self._with_logprobs = body.logprobs is not None
        self._num_top = body.logprobs or 0
        skip = body.skip_special_tokens is not False
        self._choices = [
            _Choice(
                prompt,
                CompletionLogprobs(tokenizer, skip_special_tokens=skip, as_token_ids=self._names_ids),
                [prompt.text] if prompt.text else [],
            )
            for prompt in prompts
            for _ in range(body.num_drawn)
        ]

    def plain_text(self, index: int, output: TextOutput) -> str | None:
        has_more = self._with_logprobs or self._shows_ids or self._num_scored is not None
        if has_more or self._choices[index].pending or output.finish_reason is not None:
            return None
        return output.text or None

    def plain_choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def choice_chunks(self, index: int, output: TextOutput) -> list[dict[str, Any]]:
        self.add(index, output)
        if not output.text and output.finish_reason is None:
            return []
        return [self._take(index)]

    def add(self, index: int, output: TextOutput) -> None:
        self.score(index, output)
        choice = self._choices[index]
        choice.pending += [output.text] if output.text else []
        choice.prompt_logprobs += output.prompt_logprobs
        choice.logprobs += output.logprobs
        choice.token_ids += output.token_ids
        choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def has_logprobs(self) -> bool:
        return self._with_logprobs

    @property
    def is_large(self) -> bool:
        echoed = sum(len(choice.prompt.text or "") for choice in self._choices)
        return super().is_large or echoed > _FEW_ECHOED_CHARS

    def is_large_output(self, index: int, output: TextOutput) -> bool:
        pending = self._choices[index].pending
        return super().is_large_output(index, output) or (bool(pending) and len(pending[0]) > _FEW_ECHOED_CHARS)

    def choice(self, index: int) -> dict[str, Any]:
        return self._take(index)

    def _take(self, index: int) -> dict[str, Any]:
        """An entry of `choices` with all that was collected since the last call."""
        choice = self._choices[index]
        text, choice.pending = "".join(choice.pending), []  # the one copy of an echoed prompt, which may be megabytes
        entry = self.plain_choice(index, text)
        if self._with_logprobs:
            entry["logprobs"] = self._take_logprobs(choice)
        ends = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        return entry | ends | self._more_of(choice)

    def _more_of(self, choice: _Choice) -> dict[str, Any]:
        """The fields that vLLM's extensions ask for. In a stream, the prompt's ids come with the first chunk."""
        more: dict[str, Any] = {}
        if self._shows_ids:
            more["token_ids"], choice.token_ids = choice.token_ids, []
            if not choice.ids_shown:
                choice.ids_shown = True
                more["prompt_token_ids"] = list(choice.prompt.token_ids)
        if self._num_scored is not None:
            more["prompt_logprobs"] = prompt_logprobs(self._tokenizer, choice.prompt_logprobs, self._num_scored)
        return more

    def _take_logprobs(self, choice: _Choice) -> dict[str, Any]:
        entries: list[TokenLogprob | None] = []
        if choice.prompt.text is not None and not choice.prompt_shown:
            choice.prompt_shown = True
            entries = [None, *(replace(item, top=item.top[: self._num_top]) for item in choice.prompt_logprobs)]
        entries += choice.logprobs
        choice.logprobs = []
        return choice.logprob_maker.chunk(entries, choice.prompt.token_ids[0], choice.prompt.text or "")
