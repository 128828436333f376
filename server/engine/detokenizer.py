"""Tokens → text, as the tokens arrive: whole characters only, and no stop string, even one that several tokens spell.

Doesn't know where tokens come from or where the text goes. One per request; used by `request_stream` and `generate`.
"""

import itertools
import operator
from collections.abc import Sequence

from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.engine.request import SamplingParams

REPLACEMENT = "\ufffd"
# An incomplete character shows as replacement characters at the end: one for the whole of it, or, where a tokenizer
# falls back to bytes, one for each byte of it and of the character before. If there are more, the first ones are text.
_MAX_HELD_CHARACTERS = 8
# A token's text may depend on the token before it (some tokenizers write a space only between words), so decoding
# starts this many tokens before the first new one.
_NUM_CONTEXT_TOKENS = 5
_MAX_WINDOW_TOKENS = 64  # how many tokens are decoded together at most


class Detokenizer:
    """The text of one request. `append` returns the text to show. `stop_reason` is set when a stop string is found."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._num_tokens = 0
        self._window = list(prompt_ids[-_NUM_CONTEXT_TOKENS:])  # the tokens that are decoded together
        self._num_context = 0  # how many tokens at the window's start were also in the previous window
        self._num_given = self._num_stable(self._decode(self._window))  # characters of the window already returned
        self._held = ""  # text that may turn out to begin a stop string
        self._hidden: list[bool] = []  # for each character of `_held`: it is a control token's and is not shown
        self.stop_reason: str | None = None

    def append(self, token_ids: Sequence[int], *, finished: bool = False) -> str:
        """The text to show after these tokens. finished: no more will come, so nothing is held back any longer."""
        assert self.stop_reason is None, "a stop string ended this text"
        for token_id in token_ids:
            self._window.append(token_id)
            self._num_tokens += 1
            self._hold(self._new_text())
            if self._params.stops_see_control and self._is_hidden(token_id):
                self._hold(self._control_text(token_id), hidden=True)
            if self._num_tokens >= self._params.min_tokens and self._find_stop():
                return self._take(len(self._held))
        if finished:
            self._hold(self._decode(self._window)[self._num_given :])
            if self._num_tokens >= self._params.min_tokens:
                self._find_stop()
            return self._take(len(self._held))
        return self._take(len(self._held) - self._num_held_back())

    def _new_text(self) -> str:
        """The window's text that later tokens cannot change and that was not returned yet."""
        text = self._decode(self._window)
        stable = self._num_stable(text)
        new = text[self._num_given : stable]
        self._num_given = max(self._num_given, stable)
        if stable == len(text) or len(self._window) > _MAX_WINDOW_TOKENS:
            self._move_window()
        return new

    def _move_window(self) -> None:
        """Start the window later, if the tokens left in it have text: without any, a leading space would be lost."""
        rest = self._window[self._num_context :]
        text = self._decode(rest)
        if text:
            self._window, self._num_context = rest, len(rest)
            self._num_given = self._num_stable(text)

    @staticmethod
    def _num_stable(text: str) -> int:
        """The length of the text without an incomplete character at its end."""
        num_unclear = len(text) - len(text.rstrip(REPLACEMENT))
        return len(text) - min(num_unclear, _MAX_HELD_CHARACTERS)

    def _decode(self, token_ids: list[int]) -> str:
        if hidden := self._params.hidden_token_ids:
            token_ids = [token_id for token_id in token_ids if token_id not in hidden]
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._params.skip_special_tokens)

    def _is_hidden(self, token_id: int) -> bool:
        """Whether this token is left out of the text, provided that it is a control token."""
        return self._params.skip_special_tokens or token_id in self._params.hidden_token_ids

    def _control_text(self, token_id: int) -> str:
        """The text of a control token; empty for other tokens."""
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return "" if self._tokenizer.decode([token_id], skip_special_tokens=True) else text

    def _hold(self, text: str, *, hidden: bool = False) -> None:
        self._held += text
        self._hidden += [hidden] * len(text)

    def _find_stop(self) -> bool:
        """Cut the held text at the stop string that begins first (the longest, if several begin there). Returns whether
        there was one."""
        found = [(self._held.find(stop), -len(stop), stop) for stop in self._params.stop_strings if stop in self._held]
        if found:
            start, _, stop = min(found)
            end = start + len(stop) * self._params.include_stop_str
            self._held = self._held[:end]
            self._hidden[start:] = [False] * (end - start)
            self.stop_reason = stop
        return bool(found)

    def _num_held_back(self) -> int:
        """How many characters at the end of the held text may be the beginning of a stop string."""
        longest = 0
        for stop in self._params.stop_strings:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if stop.startswith(self._held[-length:]):
                    longest = length
                    break
        return longest

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        hidden, self._hidden = self._hidden[:length], self._hidden[length:]
        return "".join(itertools.compress(text, map(operator.not_, hidden))) if any(hidden) else text
