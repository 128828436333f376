"""Makes the engine's `SamplingParams` from a request's fields, the model's defaults and the room in the context.

Doesn't know HTTP. Called by the generating routes.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from guanaco.models.error_codes import ErrorCode
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.api.generation.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_PROMPT_LOGPROBS,
    MAX_TOP_K,
    MAX_TOTAL_TOKENS,
    GenerationBody,
    TokenizeBody,
)
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.engine.constraints import AllowedTokens
from guanaco.server.engine.request import SamplingParams
from guanaco.server.engine.stops import Stops

Number = TypeVar("Number", int, float)

_SEEDS = 2**63  # seeds are int64


@dataclass(frozen=True)
class SamplingDefaults:
    """The values of fields that a client leaves out: OpenAI's defaults, or the model's own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "SamplingDefaults":
        """The defaults in the content of a `generation_config.json`; `{}` if the model has none.

        A field keeps the default of this class if the file lacks it, if its value is no number, or if its value lies
        outside the range for clients; no error is raised. `do_sample: false` means temperature 0, even if the file has
        another temperature, as in transformers.
        """
        bounds = {
            "temperature": (0.0, 2.0),
            "top_p": (1e-9, 1.0),
            "top_k": (0, MAX_TOP_K),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-9, 2.0),
        }
        given: dict[str, Any] = {}
        for name, (least, most) in bounds.items():
            value = config.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
                given[name] = int(value) if name == "top_k" else float(value)
        if config.get("do_sample") is False:
            given["temperature"] = 0.0
        return cls(**given)


def check_request(body: GenerationBody, num_token_ids: int) -> None:
    """Raise a 400 if fields contradict each other, or if a token id is beyond the model's vocabulary."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise bad_request("prompt_logprobs are not there with stream: ask for the whole answer", "prompt_logprobs")
    if body.best_of is not None and body.best_of < body.n:
        raise bad_request("best_of must be n or more: the n best are shown", "best_of")
    if body.num_drawn > body.n and body.stream:
        raise bad_request("best_of is not there with stream: which answers are best is known at their end", "best_of")
    beyond = f"a token id is beyond the model's vocabulary: token ids must be below {num_token_ids}"
    if any(token >= num_token_ids for token in body.stop_token_ids):
        raise bad_request(beyond, "stop_token_ids")
    if any(token >= num_token_ids for token, _ in body.logit_bias):
        raise bad_request(beyond, "logit_bias")
    if any(token >= num_token_ids for token in body.allowed_token_ids or ()):
        raise bad_request(beyond, "allowed_token_ids")


def num_tokens_kept(body: GenerationBody | TokenizeBody, max_model_len: int) -> int | None:
    """How many of a prompt's last tokens truncate_prompt_tokens keeps; None: all."""
    if body.truncate_prompt_tokens != -1:
        return body.truncate_prompt_tokens
    answer = DEFAULT_COMPLETION_TOKENS if body.token_limit is None else body.token_limit
    return max(1, max_model_len - answer)


def check_scored_size(body: GenerationBody, num_tokens: int, echoed: int | None = None) -> None:
    """Raise a 400 if the answer would hold too many log-probabilities of the prompts, which take memory until they are
    sent. num_tokens: of all prompts together. echoed: alternatives per token of an echoed prompt; None: none."""
    for name, num_top in (("prompt_logprobs", body.prompt_logprobs), ("logprobs", echoed)):
        if num_top is not None and num_tokens * (num_top + 1) * body.num_drawn > MAX_PROMPT_LOGPROBS:
            most = f"at most {MAX_PROMPT_LOGPROBS} log-probabilities of prompts in one answer"
            advice = "send fewer prompts, or ask for fewer"
            count = "n" if body.num_drawn == body.n else "best_of"
            raise bad_request(f"{most}, which is tokens of all prompts x ({name} + 1) x {count}: {advice}", name)


def sampling_params(
    body: GenerationBody,
    defaults: SamplingDefaults,
    *,
    tokenizer: Tokenizer,
    limit: int | None,
    limit_name: str,
    num_prompt_tokens: int,
    max_model_len: int,
    prompt_name: str,
    num_logprobs: int | None,
    prompt_logprobs: int | None = None,
    more_stops: tuple[str, ...] = (),
    default_limit: int | None = None,
) -> SamplingParams:
    """The engine's parameters for one prompt. Raises a 400 if the prompt and `limit` tokens exceed the context, or if
    the limit contradicts n or min_tokens.

    limit: the client's; without it, the most tokens are `default_limit` (None: no limit) and the room in the context.
    limit_name, prompt_name: the fields that errors name. more_stops: stop strings besides the client's.
    """
    stops = Stops.of((*body.stop, *more_stops), tokenizer)
    room = max_model_len - num_prompt_tokens
    if room < (limit != 0):  # a prompt that is only scored may fill the context
        raise context_exceeded(num_prompt_tokens, max_model_len, prompt_name)
    if limit is not None and limit > room:
        raise ApiError(
            400,
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"the prompt has {num_prompt_tokens} tokens and {limit_name} asks for {limit}, but this model's maximum "
            f"context length is {max_model_len} tokens: at most {room} can be generated",
            param=limit_name,
        )
    most = max(MAX_TOTAL_TOKENS, max_model_len)
    if limit is not None and limit * body.num_drawn > most:
        count = "n" if body.num_drawn == body.n else "best_of"
        raise bad_request(f"{count} times {limit_name} may be at most {most}", count)
    free = min(room, most // body.num_drawn)
    max_tokens = limit if limit is not None else free if default_limit is None else min(free, default_limit)
    if (body.min_tokens or 0) > max_tokens:
        raise bad_request(f"min_tokens is more than the {max_tokens} tokens that may be generated", "min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(body.temperature, defaults.temperature),
        top_p=_given(body.top_p, defaults.top_p),
        top_k=max(0, _given(body.top_k, defaults.top_k)),
        min_p=_given(body.min_p, defaults.min_p),
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=body.logit_bias,
        allowed=None if body.allowed_token_ids is None else AllowedTokens.of(body.allowed_token_ids),
        bad_words=bad_word_ids(body.bad_words, tokenizer),
        logprobs=0 if num_logprobs is None and body.num_drawn > body.n else num_logprobs,  # to compare the choices
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=stops.token_ids.union(body.stop_token_ids),
        stop_token_texts=stops.tokens,
        stop_strings=stops.strings,
        stops_see_control=stops.see_control,
        include_stop_str=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=body.skip_special_tokens is not False,
        speculation=body.speculation is not False,
    )


def bad_word_ids(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences that `bad_words` forbid, as in vLLM: each word as it is, and with a space in front if that
    gives another sequence with as many tokens."""
    found: list[tuple[int, ...]] = []
    for word in words:
        bare, spaced = (
            tuple(tokenizer.encode(text, add_bos=False, parse_control=True))
            for text in (word.lstrip(), " " + word.lstrip())
        )
        if bare:
            found.append(bare)
        if spaced and len(spaced) == len(bare) and spaced[0] != bare[0]:
            found.append(spaced)
    return tuple(dict.fromkeys(found))


def for_choice(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of choice `index`: they differ only in the seed, which is seed + index, wrapped to int64."""
    if params.seed is None or index == 0:
        return params
    return dataclasses.replace(params, seed=(params.seed + index + _SEEDS) % (2 * _SEEDS) - _SEEDS)


def context_exceeded(num_prompt_tokens: int, max_model_len: int, param: str) -> ApiError:
    """The 400 for a prompt that fills the context or exceeds it. param: the field that has the prompt."""
    or_more = " or more" if num_prompt_tokens > max_model_len else ""  # a long text is not encoded to its end
    return ApiError(
        400,
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        f"the prompt has {num_prompt_tokens} tokens{or_more}; this model's maximum context length is {max_model_len} "
        "tokens, and at least one of them must be left to generate",
        param=param,
    )


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value
