"""Limits the size of an answer before anything is generated.

An answer that isn't streamed is kept in memory until its end, and each log-probability takes a hundred bytes or more.
Doesn't know HTTP. Called by `serving`.
"""

from collections.abc import Sequence

from guanaco.server.api.generation.protocol import GenerationBody
from guanaco.server.api.http.errors import bad_request
from guanaco.server.config import Settings
from guanaco.server.engine.request import SamplingParams


def most_tokens_a_choice(
    body: GenerationBody, prompts: Sequence[tuple[int, SamplingParams]], settings: Settings, *, keeps: bool
) -> int | None:
    """The most tokens of each choice if the client set no limit; None: the limit in its parameters.

    prompts: (length in tokens, parameters) of each prompt. keeps: whether the answer is kept until its end. Raises a
    400 if the client asks for more tokens or log-probabilities than one answer may have. In a stream that is not kept
    only the prompt's log-probabilities count: they come in one event.
    """
    num_choices = body.num_drawn * len(prompts)
    num_tokens = body.num_drawn * sum(params.max_tokens for _, params in prompts)
    most: int | None = None
    if num_tokens > settings.max_answer_tokens:
        most = settings.max_answer_tokens // num_choices
        if body.token_limit is not None or most < 1:
            text = (
                f"all choices together may have at most {settings.max_answer_tokens} tokens, and this request asks for "
                f"{num_tokens}: ask for fewer prompts, choices or tokens"
            )
            raise bad_request(text, "max_tokens")
    fixed = body.num_drawn * sum(length * _entries(params.prompt_logprobs) for length, params in prompts)
    a_token = _entries(prompts[0][1].logprobs)
    if not keeps or not a_token:
        a_token = 0
    room = settings.max_answer_logprobs - fixed
    if most is not None:
        num_tokens = most * num_choices
    if num_tokens * a_token > room or room < 0:
        fitting = room // (num_choices * a_token) if a_token else 0
        if body.token_limit is not None or fitting < 1:
            text = (
                f"an answer may have at most {settings.max_answer_logprobs} log-probabilities, alternatives and the "
                f"prompt's included, and this request asks for {fixed + num_tokens * a_token}: ask for fewer prompts, "
                "choices, tokens or alternatives"
            )
            raise bad_request(text, "logprobs")
        most = fitting
    if most is not None and (body.min_tokens or 0) > most:
        raise bad_request(f"min_tokens is more than the {most} tokens that a choice may have", "min_tokens")
    return most


def _entries(num_alternatives: int | None) -> int:
    """How many log-probabilities one token has in the answer: its own and its alternatives'."""
    return 0 if num_alternatives is None else 1 + num_alternatives
