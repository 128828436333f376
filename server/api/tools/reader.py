"""Splits a model's output into content and calls, while it is generated.

Text that is not a well-formed call stays content. Only the white space around calls is lost. However a text is cut into
pieces, its events are the same. Doesn't know the formats' own rules. Made by `plan`, used by answers.
"""

from collections.abc import Collection
from dataclasses import dataclass

from guanaco.server.api.tools.call_object import NoCall
from guanaco.server.api.tools.formats.base import SPACE, Call, CallFormat, Candidate, Status


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallBegins:
    index: int  # the call's number in the answer, from 0
    name: str


@dataclass(frozen=True)
class CallArguments:
    index: int
    text: str  # a piece of the arguments' JSON


Event = Content | CallBegins | CallArguments


class ToolCallReader:
    """The reader of one answer. Call `feed` with its text as it comes, and `finish` once.

    A call is returned when it is complete. With `sure`, the text follows a grammar, so every beginning becomes a call:
    its arguments are returned as they come, and stay incomplete if the answer ends early. If it ends before the call's
    name is known, or before the arguments of a further call, the beginning is left out: it is no content.
    """

    def __init__(
        self,
        call_format: CallFormat,
        names: Collection[str],
        *,
        sure: bool = False,
        forced: bool = False,
        max_calls: int | None = None,
    ) -> None:
        """names: the functions that may be called. max_calls: text behind this many calls is content.
        forced: the text is only calls. With a single name there is a call even if the text ends before it.
        """
        self._format = call_format
        self._names = names
        self._sure = sure or forced
        self._forced = forced
        self._max_calls = max_calls
        self._text = ""  # held back: white space, or the possible beginning of a marker
        self._raw: list[str] = []  # the candidate's text, with the white space before it
        self._marker_chars = 0  # how many characters of `_raw` are white space and marker
        self._candidate: Candidate | None = None
        self._at_start = True  # a bare call may begin here
        self._after_call = False  # nothing but white space has come since the last call
        self._num_given = 0  # how many of the candidate's calls were returned
        self._live_chars: int | None = None  # how much of the current call's arguments was returned; None: no such call
        self._events: list[Event] = []
        self.num_calls = 0

    def feed(self, text: str) -> list[Event]:
        """The events of new text."""
        self._read(text, final=False)
        return self._take()

    def finish(self) -> list[Event]:
        """The events that are left when the text has ended. Call it once, after the last `feed`."""
        self._read("", final=True)
        if self._forced and not self.num_calls and (name := self._only_name) is not None:
            self._begin_call(name)
        return self._take()

    @property
    def _only_name(self) -> str | None:
        """The name of the function if only one may be called; otherwise None."""
        return next(iter(self._names)) if len(self._names) == 1 else None

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _read(self, text: str, *, final: bool) -> None:
        rest = text
        while True:
            if self._candidate is None:
                rest = self._search(rest, final=final)
                if self._candidate is None:
                    return
            rest = self._read_candidate(rest)
            if self._candidate is not None:
                if not final:
                    return
                rest = self._end_candidate()
                if self._candidate is None and not rest:
                    return

    # --- text ---------------------------------------------------------------------------------------------------------

    def _search(self, new: str, *, final: bool) -> str:
        """Return text up to the next beginning of a call as content, and start its candidate. Returns the rest."""
        text, self._text = self._text + new, ""
        start, marker = self._find(text)
        if start is not None:
            before = text[:start]
            content = before.rstrip(SPACE) if marker else ""
            self._give_content(content)
            self._raw = [text[len(content) : start + len(marker)]]
            self._marker_chars = len(self._raw[0])
            self._candidate = self._format.candidate(self._names)
            self._num_given, self._live_chars = 0, None
            return text[start + len(marker) :]
        if not final:
            kept = len(text) - self._num_held(text)
            self._give_content(text[:kept])
            self._text = text[kept:]
        elif not self._forced and not (self._after_call and not text.strip(SPACE)):
            self._give_content(text)
        return ""

    def _find(self, text: str) -> tuple[int | None, str]:
        """(position of the first beginning of a call or None, its marker or "")."""
        if self._max_calls is not None and self.num_calls >= self._max_calls:
            return None, ""
        if self._at_start and self._format.bare is not None and (match := self._format.bare.match(text)):
            return match.end() - 1, ""
        found = [(text.find(marker), marker) for marker in self._format.markers if marker in text]
        return min(found) if found else (None, "")

    def _num_held(self, text: str) -> int:
        """How many characters at the text's end may belong to a call's beginning: white space, or part of a marker."""
        longest = 0
        for marker in self._format.markers:
            for length in range(min(len(marker) - 1, len(text)), longest, -1):
                if marker.startswith(text[-length:]):
                    longest = length
                    break
        before = text[: len(text) - longest]
        held = longest + len(before) - len(before.rstrip(SPACE))
        if self._at_start and self._format.bare is not None and not text.strip(SPACE + ";"):
            held = len(text) if text.count(";") <= 1 else held
        return held

    def _give_content(self, text: str) -> None:
        if text:
            self._events.append(Content(text))
            self._at_start = self._after_call = False

    # --- candidates ---------------------------------------------------------------------------------------------------

    def _read_candidate(self, text: str) -> str:
        """Read text until the candidate ends or can't be a call. Returns the text that is to be read next."""
        candidate = self._candidate
        assert candidate is not None, "there is a candidate"
        for position, char in enumerate(text):
            try:
                status = candidate.push(char)
            except NoCall:
                return self._drop_candidate(text[position:])
            self._raw.append(char)
            if status is not Status.MORE:
                self._give_calls(candidate.calls[self._num_given :])
                self._num_given = len(candidate.calls)
                unread = "".join(self._raw[len(self._raw) - candidate.unread :])
                self._raw, self._marker_chars = [], 0
            if status is Status.END:
                self._candidate = None
                return unread + text[position + 1 :]
        self._give_live()
        return ""

    def _end_candidate(self) -> str:
        """Handle a text that ended within the candidate. Returns the text that is to be read again."""
        candidate = self._candidate
        assert candidate is not None, "there is a candidate"
        if self._live_chars is not None:  # cut off, for example at max_tokens
            self._give_calls(candidate.pending)
            self._candidate = None
            return ""
        try:
            candidate.finish()
        except NoCall:
            if not self._sure:
                return self._drop_candidate("")
            self._give_calls(candidate.pending)
            self._begin_cut_call(candidate)
        self._give_calls(candidate.calls[self._num_given :])
        self._candidate = None
        return ""

    def _drop_candidate(self, rest: str) -> str:
        """Drop a candidate that is not a call. Its beginning becomes content, and the text behind it is read again."""
        raw, self._raw, self._candidate = "".join(self._raw), [], None
        begin = max(self._marker_chars, 1)
        text = raw + rest
        self._give_content(text[:begin])
        return text[begin:]

    def _give_calls(self, calls: list[Call]) -> None:
        for call in calls:
            if self._live_chars is None:
                self._begin_call(call.name)
                self._live_chars = 0
            if rest := call.arguments[self._live_chars :]:
                self._events.append(CallArguments(self.num_calls - 1, rest))
            self._live_chars = None

    def _begin_call(self, name: str) -> None:
        self._events.append(CallBegins(self.num_calls, name))
        self.num_calls += 1
        self._at_start = self._after_call = True

    def _begin_cut_call(self, candidate: Candidate) -> None:
        """The text ended before the arguments of the candidate's current call: only its name can be given.

        Behind other calls it is left out: clients take no arguments for an empty object, and would run the function.
        """
        if self.num_calls:
            return
        name = candidate.name
        if name is None and candidate.current is not None:
            name = self._only_name
        if name is not None:
            self._begin_call(name)

    def _give_live(self) -> None:
        """Return the new part of the current call's arguments, if it is certain to become a call."""
        current = self._candidate.current if self._candidate is not None else None
        if not self._sure or current is None or current.name is None or current.arguments_start is None:
            return
        if self._live_chars is None:
            self._begin_call(current.name)
            self._live_chars = 0
        if new := current.arguments_from(self._live_chars):
            self._events.append(CallArguments(self.num_calls - 1, new))
            self._live_chars += len(new)


def read_events(reader: ToolCallReader | None, text: str, *, is_last: bool) -> list[Event]:
    """The events of the next piece of an answer. Without a reader all text is content."""
    if reader is None:
        return [Content(text)] if text else []
    events = reader.feed(text)
    return events + reader.finish() if is_last else events
