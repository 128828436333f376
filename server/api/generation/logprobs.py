"""Token log-probabilities in the two shapes that OpenAI's routes answer with.

Doesn't compute any: they come from the engine. Used by the chat and completion routes.
"""

import codecs
from collections.abc import Sequence
from typing import Any

from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.engine.request import TokenLogprob

# JSON has no minus infinity (a token that a bias or a mask forbids); vLLM's number in its place.
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    return {
        "content": [
            {
                **_entry(tokenizer, item.token_id, item.logprob),
                "top_logprobs": [_entry(tokenizer, token, value) for token, value in item.top],
            }
            for item in logprobs
        ],
        "refusal": None,
    }


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": _text(raw), "logprob": max(logprob, _LOWEST), "bytes": list(raw)}


def _text(raw: bytes) -> str:
    """A token may be part of a character: `bytes` has what the replacement mark hides."""
    return raw.decode("utf-8", "replace")


class CompletionLogprobs:
    """Builds `choices[].logprobs` of a text completion. Text offsets count the characters of the choice's text and run
    on from one chunk to the next; special tokens that the text leaves out take no room in it."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        self._offset = 0

    def chunk(
        self, logprobs: Sequence[TokenLogprob | None], first_token: int | None = None, prompt_text: str = ""
    ) -> dict[str, Any]:
        """The next positions. A None stands for the prompt's first token, `first_token`, which nothing predicts.

        prompt_text: how the choice's text begins. Control tokens that a client wrote into its prompt are in it.
        """
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for item in logprobs:
            token_id = first_token if item is None else item.token_id
            assert token_id is not None
            raw = self._tokenizer.token_bytes(token_id)
            text = _text(raw)
            result["tokens"].append(text)
            result["token_logprobs"].append(None if item is None else max(item.logprob, _LOWEST))
            result["top_logprobs"].append(None if item is None else self._top(item, text))
            result["text_offset"].append(self._offset)
            if token_id not in self._hidden or (raw and prompt_text.startswith(text, self._offset)):
                self._offset += len(self._decoder.decode(raw))
        return result

    def _top(self, item: TokenLogprob, text: str) -> dict[str, float]:
        """By text; where two tokens have the same one, the likelier stands, so that the largest value in here is the
        most likely token's: lm-eval compares a token's own logprob with it to see whether it was the greedy choice."""
        top: dict[str, float] = {}
        for token, value in item.top:
            top.setdefault(_text(self._tokenizer.token_bytes(token)), max(value, _LOWEST))
        top.setdefault(text, max(item.logprob, _LOWEST))
        return top
