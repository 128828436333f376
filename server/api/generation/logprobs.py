"""Token log-probabilities in the two shapes that OpenAI's routes answer with.

The engine computes them. Used by the chat and completion routes.
"""

import codecs
from collections.abc import Sequence
from typing import Any

from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.engine.request import TokenLogprob

# JSON has no minus infinity, the log-probability of a forbidden token. vLLM writes this number instead.
_LOWEST = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], *, as_token_ids: bool = False
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion. as_token_ids: write `token_id:5` in place of a token's text."""
    return {
        "content": [
            {
                **_entry(tokenizer, item.token_id, item.logprob, as_token_ids),
                "top_logprobs": [_entry(tokenizer, token, value, as_token_ids) for token, value in item.top],
            }
            for item in logprobs
        ],
        "refusal": None,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: null for the first token, which nothing predicts, then an object for each other token.
    The object's keys are token ids in decimal digits: the prompt's own token, and the `num_top` likeliest ones with
    ranks from 1."""
    return [None, *(_ranked(tokenizer, item, num_top) for item in logprobs)]


def _ranked(tokenizer: Tokenizer, item: TokenLogprob, num_top: int) -> dict[str, Any]:
    likeliest = {token: (value, place) for place, (token, value) in enumerate(item.top[:num_top], start=1)}
    entries = {item.token_id: (item.logprob, item.rank), **likeliest}
    return {
        str(token): {
            "logprob": max(value, _LOWEST),
            "rank": rank,
            "decoded_token": _text(tokenizer.token_bytes(token)),
        }
        for token, (value, rank) in entries.items()
    }


def name_of(token_id: int) -> str:
    """How vLLM names a token by its id."""
    return f"token_id:{token_id}"


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float, as_token_ids: bool) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": name_of(token_id) if as_token_ids else _text(raw),
        "logprob": max(logprob, _LOWEST),
        "bytes": list(raw),
    }


def _text(raw: bytes) -> str:
    """A token's bytes as text. Parts of a character become U+FFFD; the field `bytes` has them."""
    return raw.decode("utf-8", "replace")


class CompletionLogprobs:
    """Builds `choices[].logprobs` of a text completion, chunk by chunk. Text offsets count the characters of the whole
    choice's text. Special tokens that are left out of the text take no characters."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, as_token_ids: bool = False) -> None:
        """as_token_ids: write `token_id:5` in place of a token's text."""
        self._as_token_ids = as_token_ids
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        self._offset = 0

    def chunk(
        self, logprobs: Sequence[TokenLogprob | None], first_token: int | None = None, prompt_text: str = ""
    ) -> dict[str, Any]:
        """The entries of the next positions. None in `logprobs` is the prompt's first token, `first_token`, which
        nothing predicts.

        prompt_text: the echoed prompt with which the choice's text begins, control tokens included.
        """
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for item in logprobs:
            token_id = first_token if item is None else item.token_id
            assert token_id is not None
            raw = self._tokenizer.token_bytes(token_id)
            text = _text(raw)
            name = name_of(token_id) if self._as_token_ids else text
            result["tokens"].append(name)
            result["token_logprobs"].append(None if item is None else max(item.logprob, _LOWEST))
            result["top_logprobs"].append(None if item is None else self._top(item, name))
            result["text_offset"].append(self._offset)
            if token_id not in self._hidden or (raw and prompt_text.startswith(text, self._offset)):
                self._offset += len(self._decoder.decode(raw))
        return result

    def _top(self, item: TokenLogprob, name: str) -> dict[str, float]:
        """Text → log-probability of the likeliest tokens. If two tokens have the same text, the likelier one counts.
        lm-eval compares a token's own log-probability with the largest here to see whether it was the greedy choice."""
        top: dict[str, float] = {}
        for token, value in item.top:
            top.setdefault(self._name(token), max(value, _LOWEST))
        top.setdefault(name, max(item.logprob, _LOWEST))
        return top

    def _name(self, token_id: int) -> str:
        return name_of(token_id) if self._as_token_ids else _text(self._tokenizer.token_bytes(token_id))
