"""Text ↔ token ids, and conversations → token ids, over the `tokenizers` package.

What a user types in a message never becomes a control token: only a chat template, the BOS rule, raw prompts (`encode`
with `parse_control`) and token ids do.
Knows nothing of requests or streaming. Called by the API and the command line; safe to use from several threads.
"""

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from guanaco.models.errors import TokenizerError
from guanaco.models.text.chat_template import MAX_OUTPUT_CHARS, ChatTemplate, TemplateError
from guanaco.models.text.token_pattern import longest_match_pattern
from guanaco.models.text.tokenizer_files import TokenizerFiles, read_tokenizer
from guanaco.models.text.tokenizer_json import SPACE

# What LLaMA's vocabularies call them, where nothing else does.
_USUAL_BOS = ("<s>", "<|begin_of_text|>")
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")
_USUAL_UNK = ("<unk>",)


class Tokenizer:
    """One model's tokenizer. Ids are those of its vocabulary; `notes` is what an operator should know about it."""

    def __init__(self, files: TokenizerFiles) -> None:
        backend = files.backend
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.vocab_size: int = max([backend.get_vocab_size() - 1, *added]) + 1
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._names = self._complete_names(files.names)
        self.bos_id = self._id_of("bos_token")
        eos_id = self._id_of("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)
        self.unk_id = self._id_of("unk_token")
        frame = backend.encode("", add_special_tokens=True).ids  # what its own rule puts around a text
        by_rule = self.bos_id is not None and frame[:1] == [self.bos_id]
        adds_eos = files.adds_eos or (eos_id is not None and frame[int(by_rule) :][-1:] == [eos_id])
        self._adds_bos = self.bos_id is not None and (by_rule if files.add_bos is None else files.add_bos)
        self._added_texts = {index: token.content for index, token in added.items()}
        self._bytes = _ByteLevel() if "ByteLevel" in _part_types(backend.decoder) else None
        self.notes, self.chat_template = self._compile(files)
        if adds_eos:
            self.notes += ("its tokenizer's rule is to put eos behind every text: prompts get none",)
        self._control = _ControlTokens([(i, t) for i, t in added.items() if t.special and len(t.content) > 1])
        # From here on the special tokens are searched for in no text; their stand-ins are, in that of templates.
        backend.encode_special_tokens = True
        self._control.add_stand_ins(backend)

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a model directory or GGUF file. Raises ModelError for what is missing or damaged."""
        return cls(read_tokenizer(path))

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works without a template that is given to it."""
        return self.chat_template is not None

    def encode(self, text: str, *, add_bos: bool | None = None, parse_control: bool = False) -> list[int]:
        """Ids of a text. add_bos: put BOS in front; None means as the tokenizer's own rule says.

        parse_control: read control tokens in the text as such, for a prompt that its writer has templated; else they
        stay text. A prompt that begins with BOS gets no second one.
        """
        ids = self._encode_control(text) if parse_control else self._encode(text)
        if self.bos_id is not None and (self._adds_bos if add_bos is None else add_bos):
            return ids if parse_control and ids[:1] == [self.bos_id] else [self.bos_id, *ids]
        return ids

    def control_id(self, text: str) -> int | None:
        """The id of the control token that is spelled `text`; None where no control token is."""
        return self._control.id_of(text)

    def holds_control(self, text: str) -> bool:
        """Whether a control token's text is somewhere in `text`."""
        return self._control.is_in(text)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: ChatTemplate | None = None,
        max_chars: int = MAX_OUTPUT_CHARS,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation through `template`, or the model's own if that is None. max_chars: of the prompt.

        What the template writes as control tokens becomes them; the strings of messages and tools stay text. BOS comes
        from a template that is complete, and otherwise from the tokenizer's rule. Raises TemplateError.
        """
        template = template or self.chat_template
        if template is None:
            raise TemplateError(
                "the model has no chat template: start the server with --chat-template guanaco (or one)"
            )
        names = dict(self._names)
        try:
            text = template.render(
                [self._control.mark(message) for message in messages],
                bos_token=names.pop("bos_token", None),
                eos_token=names.pop("eos_token", None),
                add_generation_prompt=add_generation_prompt,
                special_tokens=names,
                max_chars=max_chars,
                tools=None if tools is None else [self._control.mark(tool) for tool in tools],
            )
        except TemplateError as error:
            raise TemplateError(self._control.unmark(str(error)), error.code) from error
        ids = self._encode_control(text)
        if not template.is_complete and self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; those outside of the vocabulary are nothing."""
        known = [index for index in ids if 0 <= index < self.vocab_size]
        # Only the batched calls release the interpreter's lock: a long text would stop every stream.
        return str(self._backend.decode_batch([known], skip_special_tokens=skip_special_tokens)[0])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: perhaps a part of a character, for a control token its name."""
        if token_id in self._added_texts:
            return self._added_texts[token_id].encode()
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            return b""
        if self._bytes is not None:
            return self._bytes.decode(token)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return str(token).replace(SPACE, " ").encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _encode_control(self, text: str) -> list[int]:
        return [self._control.real_ids.get(index, index) for index in self._encode(self._control.substitute(text))]

    def _encode(self, text: str) -> list[int]:
        # Half a surrogate pair is no character; JSON can carry it all the same.
        clean = text.encode("utf-8", "replace").decode("utf-8")
        try:
            # As in `decode`; the fast one leaves out the offsets, which nobody asks for.
            return list(self._backend.encode_batch_fast([clean], add_special_tokens=False)[0].ids)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the package's, and no Exception
                raise
            raise TokenizerError(f"the model's tokenizer failed on a text of {len(clean)} characters") from None

    def _id_of(self, name: str) -> int | None:
        return self._backend.token_to_id(self._names[name]) if name in self._names else None

    def _complete_names(self, names: dict[str, str]) -> dict[str, str]:
        """With LLaMA's usual tokens where the files name none."""
        for name, usual in (("bos_token", _USUAL_BOS), ("eos_token", _USUAL_EOS), ("unk_token", _USUAL_UNK)):
            found = (token for token in usual if self._backend.token_to_id(token) in self.special_ids)
            if name not in names and (token := next(found, None)):
                names = {**names, name: token}
        return names

    def _compile(self, files: TokenizerFiles) -> tuple[tuple[str, ...], ChatTemplate | None]:
        """A model whose template is broken can still complete texts, and be given another template."""
        if files.chat_template is None:
            return files.notes, None
        try:
            template = ChatTemplate(files.chat_template, name="of the model")
            template.try_out(self._names)
            return (*files.notes, *template.notes), template
        except TemplateError as error:
            return (f"{error}: give another one with --chat-template", *files.notes), None


class _ControlTokens:
    """Tells control tokens that a template wrote from those that a message holds.

    Before rendering, a mark is put inside each control token in the messages; afterwards, what is still whole must be
    the template's and is replaced by a stand-in, and the marks go. The stand-ins are added tokens that nobody can type:
    mark and stand-ins hold random characters from Unicode's private planes, drawn anew in every process.
    """

    def __init__(self, tokens: list[tuple[int, AddedToken]]) -> None:
        self._mark = _private_text()
        self._escaped_mark = json.dumps(self._mark)[1:-1]  # as a template's tojson may write it
        self._tokens = tokens
        self._ids = {token.content: index for index, token in tokens}
        self._stand_ins = {token.content: _private_text() for _, token in tokens}
        pattern = longest_match_pattern(self._stand_ins)
        self._whole = re.compile(pattern)
        self._starts = re.compile(f"(?={pattern})")
        self.real_ids: dict[int, int] = {}

    def add_stand_ins(self, backend: Any) -> None:
        """Each matches in text exactly where its token would; `real_ids` leads back to the token."""
        added = []
        for _, token in self._tokens:
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            added.append(AddedToken(self._stand_ins[token.content], special=False, **flags))
        backend.add_tokens(added)  # at once: each call sorts all added tokens anew
        for index, token in self._tokens:
            self.real_ids[backend.token_to_id(self._stand_ins[token.content])] = index

    def id_of(self, text: str) -> int | None:
        """The id of the token that is spelled `text`."""
        return self._ids.get(text)

    def is_in(self, text: str) -> bool:
        """Whether a token's text is somewhere in `text`."""
        return self._whole.search(text) is not None

    def mark(self, value: Any) -> Any:
        """A copy of a message with the mark after the first character of every control token in its strings."""
        if isinstance(value, str):
            pieces = list(_split_after(value, [match.start() + 1 for match in self._starts.finditer(value)]))
            return self._mark.join(pieces)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def substitute(self, text: str) -> str:
        """A rendered text with the template's control tokens as stand-ins, the messages' as they were."""
        return self.unmark(self._whole.sub(lambda match: self._stand_ins[match[0]], text))

    def unmark(self, text: str) -> str:
        """`text` without marks."""
        return text.replace(self._mark, "").replace(self._escaped_mark, "")


def _split_after(text: str, cuts: list[int]) -> Iterator[str]:
    start = 0
    for cut in cuts:
        yield text[start:cut]
        start = cut
    yield text[start:]


def _private_text() -> str:
    """Six random characters of a private plane, 96 bits; without case, width or meaning to any text function."""
    return "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(6))


class _ByteLevel:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the rest as characters from U+0100 on."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._byte_of = {chr(byte): byte for byte in printable}
        self._byte_of |= {chr(0x100 + number): byte for number, byte in enumerate(others)}

    def decode(self, token: str) -> bytes:
        """The bytes of a token; of one that is not spelled so, its text's."""
        if all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        return token.encode()


def _part_types(part: Any) -> set[str]:
    """Names of the types in a tokenizer's component and those inside it."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("type"), str):
                yield value["type"]
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from walk(item)

    return set() if part is None else set(walk(json.loads(part.__getstate__())))
