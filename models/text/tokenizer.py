"""Text ↔ token ids, and conversations → token ids, over the `tokenizers` package.

What a user types in a message never becomes a control token: only a chat template, the BOS rule, raw prompts (`encode`
with `parse_control`) and token ids do.
Knows nothing of requests or streaming. Called by the API and the command line; safe to use from several threads.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from guanaco.models.errors import TokenizerError
from guanaco.models.text.chat_template import MAX_OUTPUT_CHARS, ChatTemplate, TemplateError
from guanaco.models.text.control_tokens import ControlTokens
from guanaco.models.text.tokenizer_files import TokenizerFiles, read_tokenizer
from guanaco.models.text.tokenizer_json import SPACE

# What LLaMA's vocabularies call them, where nothing else does.
_USUAL_BOS = ("<s>", "<|begin_of_text|>")
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")
_USUAL_UNK = ("<unk>",)

# How the tokens of a long text are counted before it is encoded as a whole.
_FREE_BYTES = 1 << 17  # so many more than the most tokens are encoded at once: each token has a byte, or more
_COUNTED_CHARS = 1 << 16
_PER_CUT = 64  # tokens that a cut may add: those of a control token's stand-in, or of one long token


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
        self.tool_template = self._compile_tool_template(files)  # for chats with tools; None: the same
        if adds_eos:
            self.notes += ("its tokenizer's rule is to put eos behind every text: prompts get none",)
        self._control = ControlTokens([(i, t) for i, t in added.items() if t.special and len(t.content) > 1])
        # From here on the special tokens are searched for in no text; their stand-ins are, in that of templates.
        backend.encode_special_tokens = True
        self._control.add_stand_ins(backend)

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a model directory or GGUF file. Raises ModelError for what is missing or damaged."""
        return cls(read_tokenizer(path))

    def encode(
        self, text: str, *, add_bos: bool | None = None, parse_control: bool = False, max_tokens: int | None = None
    ) -> list[int]:
        """Ids of a text. add_bos: put BOS in front; None means as the tokenizer's own rule says.

        parse_control: read control tokens in the text as such, for a prompt that its writer has templated; else they
        stay text. A prompt that begins with BOS gets no second one.
        max_tokens: of a text with clearly more of them only the beginning is encoded, to more than `max_tokens` ids.
        """
        ids = self._encode_control(text, max_tokens) if parse_control else self._encode(text, max_tokens)
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
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
        template: ChatTemplate | None = None,
        max_chars: int = MAX_OUTPUT_CHARS,
        max_tokens: int | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation through `template`, or the model's own if that is None. max_chars: of the prompt;
        max_tokens: as of `encode`; continue_final_message, variables: as of the template's `render`.

        What the template writes as control tokens becomes them; the strings of messages, tools and variables stay
        text. BOS comes from a template that is complete, and otherwise from the tokenizer's rule. Raises TemplateError.
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
                continue_final_message=continue_final_message,
                variables=self._control.mark(dict(variables)),
                special_tokens=names,
                max_chars=max_chars,
                tools=None if tools is None else [self._control.mark(tool) for tool in tools],
            )
        except TemplateError as error:
            raise TemplateError(self._control.unmark(str(error)), error.code) from error
        ids = self._encode_control(text, max_tokens)
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

    def _encode_control(self, text: str, max_tokens: int | None) -> list[int]:
        ids = self._encode(self._control.substitute(text), max_tokens)
        return [self._control.real_ids.get(index, index) for index in ids]

    def _encode(self, text: str, max_tokens: int | None) -> list[int]:
        # Half a surrogate pair is no character; JSON can carry it all the same.
        data = text.encode("utf-8", "replace")
        clean = data.decode("utf-8")
        if max_tokens is not None and len(data) > max_tokens + _FREE_BYTES:
            beginning = self._beginning(clean, max_tokens)
            encoding = self._backend_encoding(beginning)
            if len(encoding) > max_tokens or len(beginning) == len(clean):
                return self._ids_of(encoding)
        return self._ids_of(self._backend_encoding(clean))

    @staticmethod
    def _ids_of(encoding: Any) -> list[int]:
        ids: list[int] = encoding.ids  # a list of its own at each call
        return ids

    def _beginning(self, text: str, max_tokens: int) -> str:
        """The text, or as much of its beginning as clearly has more than `max_tokens` tokens. The pieces that are
        counted are cut anywhere, so that the count may be a little too high. Making a list of millions of ids would
        hold the interpreter's lock; counting those of a piece does not."""
        count = 0
        for start in range(0, len(text), _COUNTED_CHARS):
            count += len(self._backend_encoding(text[start : start + _COUNTED_CHARS])) - _PER_CUT
            if count > max_tokens + max_tokens // 4:
                return text[: start + _COUNTED_CHARS]
        return text

    def _backend_encoding(self, text: str) -> Any:
        try:
            # As in `decode`; the fast one leaves out the offsets, which nobody asks for.
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the package's, and no Exception
                raise
            raise TokenizerError(f"the model's tokenizer failed on a text of {len(text)} characters") from None

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

    def _compile_tool_template(self, files: TokenizerFiles) -> ChatTemplate | None:
        if files.tool_template is None or self.chat_template is None:
            return None
        try:
            template = ChatTemplate(files.tool_template, name="tool_use of the model")
            template.try_out(self._names)
        except TemplateError as error:
            self.notes = (f"{error}: the default one is used for chats with tools", *self.notes)
            return None
        return template


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
