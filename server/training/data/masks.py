"""Makes token ids from a row, and marks each token that the model has to learn. Uses the server's own template code.

So the ids of a conversation are those that the server makes of it. The model learns the answers, and the token that
ends each of them. Knows no files. Called by `dataset`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import TemplateError
from guanaco.models.text.chat_template import ChatTemplate
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.training.data.rows import Message, RefusalKind, Row, RowError

TRAIN_ON = ("answers", "all")
_MAX_STOP_TOKENS = 16  # a template's stop string is looked for in so many tokens after an answer
_NEXT_USER = Message("user", "Hello!")  # any text will do: it shows how the template begins the next turn


@dataclass(frozen=True)
class Encoded:
    """One training sequence."""

    line: int
    ids: tuple[int, ...]
    learned: tuple[bool, ...]  # for each id; the first id is never predicted, whatever its mark
    num_dropped_messages: int = 0  # messages at the end that were left out because the row was too long

    @property
    def num_learned(self) -> int:
        """How many tokens are predicted and count in the loss."""
        return sum(self.learned[1:])


class _Inconsistent(RowError):
    """The template writes an answer in another way when more messages follow it."""


class Encoder:
    """Encodes rows for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int],
        template: ChatTemplate | None = None,
        train_on: str = "answers",
        max_length: int = 1024,
    ) -> None:
        """eos_ids: the tokens that end an answer in the server, the tokenizer's own first. template: None means the
        model's own. train_on: a name of TRAIN_ON. max_length: most tokens of a sequence, its end included."""
        assert train_on in TRAIN_ON
        self._tokenizer = tokenizer
        self._template = template or tokenizer.chat_template
        self._eos_ids = tuple(eos_ids)
        self._learns_all = train_on == "all"
        self.max_length = max_length

    def encode(self, row: Row, *, may_cut: bool = False) -> tuple[Encoded, ...]:
        """The sequences of a row: one, or one for each answer if the template rewrites earlier answers.

        may_cut: leave out whole exchanges at the end of a conversation that is too long. No answer is ever cut.
        Raises RowError for a row that is too long, that the template refuses, or that has no learned token.
        Raises TemplateError if the template can't be rendered and the row is not the reason.
        """
        try:
            return (self._checked(row, may_cut),)
        except _Inconsistent:
            return tuple(self._checked(part, may_cut) for part in _one_for_each_answer(row))

    def _checked(self, row: Row, may_cut: bool) -> Encoded:
        encoded = self._chat(row) if row.is_chat else self._text(row)
        dropped = 0
        while may_cut and len(encoded.ids) > self.max_length and len(row.messages) > 3:
            row, dropped = replace(row, messages=row.messages[:-2]), dropped + 2
            encoded = replace(self._chat(row), num_dropped_messages=dropped)
        if len(encoded.ids) > self.max_length:
            problem = f"the row has {len(encoded.ids)} tokens, and --max-length is {self.max_length}"
            raise RowError(RefusalKind.TOO_LONG, f"{problem}: raise it, or shorten the row")
        if not encoded.num_learned:
            raise RowError(RefusalKind.NOTHING_TO_LEARN, "none of the row's tokens is learned: remove the row")
        return encoded

    def _text(self, row: Row) -> Encoded:
        """Encode a plain text as /v1/completions does: with control tokens, and BOS by the tokenizer's rule."""
        ids = self._tokenizer.encode(row.prompt + row.text, parse_control=True)
        start = int(ids[:1] == [self._tokenizer.bos_id])
        if row.prompt and not self._learns_all:
            found = self._end_of(self._tokenizer.encode(row.prompt, parse_control=True), ids)
            if found is None:
                problem = "the prompt's last characters change when the completion follows"
                raise RowError(RefusalKind.TEMPLATE, f"{problem}: end the prompt with a word or a sign")
            start = found
        ids += self._eos_ids[:1] if ids[-1:] != list(self._eos_ids[:1]) else ()
        return Encoded(row.line, tuple(ids), tuple(place >= start for place in range(len(ids))))

    def _chat(self, row: Row) -> Encoded:
        messages, ids = row.messages, self._render(row.messages)
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message.role != "assistant" or not (message.learned or self._learns_all):
                continue
            start = self._end_of(self._render(messages[:number], prompt=True), ids)
            if start is None:
                raise _inconsistent(messages)
            if number == len(messages) - 1:
                ids, end = self._last_end(messages, ids, start)
            else:
                found = self._turn_end(self._render(messages[: number + 1]), ids, start)
                if found is None:
                    raise _inconsistent(messages)
                end = found
            spans.append((start, end))
        ids = ids[: spans[-1][1]]  # tokens after the last learned one don't change the loss
        first = int(ids[:1] == [self._tokenizer.bos_id])
        if self._learns_all:
            spans = [(first, len(ids))]
        learned = tuple(any(start <= place < end for start, end in spans) for place in range(len(ids)))
        return Encoded(row.line, tuple(ids), learned)

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> list[int]:
        """The server's ids of a conversation. prompt: append the template's beginning of the next answer."""
        try:
            return self._tokenizer.encode_chat(
                [message.for_template() for message in messages],
                add_generation_prompt=prompt,
                template=self._template,
            )
        except TemplateError as error:
            if error.code != ErrorCode.TEMPLATE_ERROR or self._template is None:
                raise
            raise RowError(RefusalKind.TEMPLATE, f"the chat template refuses the messages: {error}") from None

    def _end_of(self, beginning: Sequence[int], ids: Sequence[int]) -> int | None:
        """How many tokens of `ids` cover the text of `beginning`; None if `ids` begin with another text.

        The last of these tokens may also hold characters that follow the beginning.
        """
        same = 0
        while same < min(len(beginning), len(ids)) and beginning[same] == ids[same]:
            same += 1
        wanted = self._bytes(beginning[same:])
        covered = b""
        for place in range(same, len(ids) + 1):
            if len(covered) >= len(wanted):
                return place if covered.startswith(wanted) else None
            covered += self._bytes(ids[place : place + 1])
        return None

    def _turn_end(self, alone: Sequence[int], ids: Sequence[int], start: int) -> int | None:
        """The end (exclusive) of the learned part of an answer that is followed by another turn.

        The part ends with the end-of-text token, which may be in `alone` or at the next turn's beginning in `ids`. If
        there is none, it ends with the template's stop string, or else with the answer's last token. alone: the ids of
        the conversation up to this answer. start: where the answer begins. None if the template writes the answer in
        another way when it is the last one.
        """
        end = self._eos_behind(alone, start, len(alone))
        if end is not None and list(alone[:end]) == list(ids[:end]):
            return end
        stop = self._end_of(alone, ids)
        return None if stop is None else self._turn_end_behind(ids, start, stop)

    def _turn_end_behind(self, ids: Sequence[int], start: int, stop: int) -> int:
        """As `_turn_end`, for an answer whose text is `ids[start:stop]`."""
        if (end := self._eos_behind(ids, start, stop)) is not None:
            return end
        text = b""
        for place in range(stop, min(len(ids), stop + _MAX_STOP_TOKENS)):
            text += self._bytes(ids[place : place + 1])
            if text.strip() and any(text.lstrip().startswith(stop_text) for stop_text in self._stop_texts()):
                return place + 1
        return stop

    def _last_end(self, messages: Sequence[Message], ids: list[int], start: int) -> tuple[list[int], int]:
        """(the ids with the end of the last answer, where the learned part ends).

        If the template writes an answer's end only at the beginning of the next turn, it is taken from there. If it
        writes none at all, the end-of-text token is appended, at which the server stops.
        """
        if (end := self._eos_behind(ids, start, len(ids))) is not None:
            return ids, end
        try:
            longer = self._render([*messages, _NEXT_USER])
        except RowError:
            longer = []
        stop = self._end_of(ids, longer)
        if stop is not None and (end := self._eos_behind(longer, stop, stop)) is not None:
            return longer, end
        if self._eos_ids:
            return [*ids, self._eos_ids[0]], len(ids) + 1
        return (ids, len(ids)) if stop is None else (longer, self._turn_end_behind(longer, start, stop))

    def _eos_behind(self, ids: Sequence[int], start: int, stop: int) -> int | None:
        """The place after the first end-of-text token from `start` on. None if there is none, or if there is more than
        white space between `stop` and that token."""
        place = next((place for place in range(start, len(ids)) if ids[place] in self._eos_ids), None)
        return None if place is None or self._bytes(ids[stop:place]).strip() else place + 1

    def _stop_texts(self) -> tuple[bytes, ...]:
        return () if self._template is None else tuple(text.encode() for text in self._template.stop_strings)

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._tokenizer.token_bytes(index) for index in ids)


def _inconsistent(messages: Sequence[Message]) -> RowError:
    if sum(message.role == "assistant" for message in messages) > 1:
        return _Inconsistent(RefusalKind.TEMPLATE, "the chat template rewrites earlier answers")
    return RowError(RefusalKind.TEMPLATE, "the chat template writes the question in another way once it is answered")


def _one_for_each_answer(row: Row) -> list[Row]:
    """A row for each learned answer: the conversation up to it, in which only this answer is learned."""
    rows = []
    for number, message in enumerate(row.messages):
        if message.learned:
            before = tuple(replace(earlier, learned=False) for earlier in row.messages[:number])
            rows.append(replace(row, messages=(*before, message)))
    return rows
