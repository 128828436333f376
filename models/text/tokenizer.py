"""Text ↔ token ids, and conversations → token ids, over the `tokenizers` package.

Text that a user types in a message never becomes a control token. Only a chat template, the BOS rule, raw prompts
(`encode` with `parse_control`) and token ids make control tokens. Knows nothing of requests or streaming. Called by the
API and the command line; safe to use from several threads.
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

# LLaMA's names of these tokens, used if the files name none.
_USUAL_BOS = ("<s>", "<|begin_of_text|>")
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")
_USUAL_UNK = ("<unk>",)

_MOST_JOINED = 128  # tokens decoded in Python: microseconds. More of them would hold the interpreter's lock too long
# How the tokens of a long text are counted before it is encoded as a whole.
_FREE_BYTES = 1 << 17  # a text with up to this many bytes more than `max_tokens` is encoded without counting
_COUNTED_CHARS = 1 << 16  # the characters of one counted piece
_PER_CUT = 64  # the most tokens that a cut between two pieces adds: of a stand-in, or of one long token


class Tokenizer:
    """One model's tokenizer. Ids are those of its vocabulary. `notes` are sentences for the operator."""

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
        frame = backend.encode("", add_special_tokens=True).ids  # the tokens that its own rule puts around a text
        by_rule = self.bos_id is not None and frame[:1] == [self.bos_id]
        adds_eos = files.adds_eos or (eos_id is not None and frame[int(by_rule) :][-1:] == [eos_id])
        self._adds_bos = self.bos_id is not None and (by_rule if files.add_bos is None else files.add_bos)
        self._added_texts = {index: token.content for index, token in added.items()}
        parts = _part_types(backend.decoder)
        self._bytes = _ByteLevel() if "ByteLevel" in parts else None
        self._is_joined = parts == {"ByteLevel"}  # a text is the bytes of its tokens, one after the other
        self._pieces: dict[int, bytes] = {}  # token → its bytes in a joined text; filled as tokens come
        self.notes, self.chat_template = self._compile(files)
        self.tool_template = self._compile_tool_template(files)  # for chats with tools; None: use `chat_template`
        if adds_eos:
            self.notes += ("its tokenizer's rule is to put eos behind every text: prompts get none",)
        self._control = ControlTokens([(i, t) for i, t in added.items() if t.special and len(t.content) > 1])
        # From here on the backend no longer searches texts for special tokens, only for their stand-ins.
        backend.encode_special_tokens = True
        self._control.add_stand_ins(backend)

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a model directory or GGUF file. Raises ModelError for what is missing or damaged."""
        return cls(read_tokenizer(path))

    def encode(
        self, text: str, *, add_bos: bool | None = None, parse_control: bool = False, max_tokens: int | None = None
    ) -> list[int]:
        """The token ids of a text. add_bos: put BOS in front; None: follow the tokenizer's own rule.

        parse_control: read control tokens in the text, for a raw prompt; otherwise they stay text. A prompt that begins
        with BOS gets no second one. max_tokens: a text with clearly more tokens is cut before it is encoded; the result
        still has more than `max_tokens` ids.
        """
        ids = self._encode_control(text, max_tokens) if parse_control else self._encode(text, max_tokens)
        if self.bos_id is not None and (self._adds_bos if add_bos is None else add_bos):
            return ids if parse_control and ids[:1] == [self.bos_id] else [self.bos_id, *ids]
        return ids

    def control_id(self, text: str) -> int | None:
        """The id of the control token with exactly this text; None if there is none."""
        return self._control.id_of(text)

    def holds_control(self, text: str) -> bool:
        """Whether `text` contains the text of any control token."""
        return self._control.is_in(text)

    def encode_part(self, text: str) -> list[int]:
        """The token ids of a text that goes on from another one: no BOS, and control tokens stay text."""
        return self.encode(text, add_bos=False)

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
        """The token ids of a conversation. template: None means the model's own.

        max_tokens: as in `encode`. The other arguments: as in `ChatTemplate.render`. Only control tokens that the
        template writes become control tokens; strings in messages, tools and variables stay text. BOS comes from the
        template if it is complete, otherwise from the tokenizer's rule. Raises TemplateError.
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
        """The text of token ids. Ids outside the vocabulary have no text."""
        if self._is_joined and len(ids) <= _MOST_JOINED:
            skipped = self.special_ids if skip_special_tokens else ()
            pieces = [self._pieces.get(index) or self._piece(index) for index in ids if index not in skipped]
            return b"".join(pieces).decode("utf-8", "replace")
        known = [index for index in ids if 0 <= index < self.vocab_size]
        # Only the batched calls release the interpreter's lock. Without that, a long text would stop every stream.
        return str(self._backend.decode_batch([known], skip_special_tokens=skip_special_tokens)[0])

    def _piece(self, token_id: int) -> bytes:
        """The bytes of one token in a joined text, kept for the next time. Empty for ids outside the vocabulary."""
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None or self._bytes is None:
            return b""
        piece = self._pieces[token_id] = self._bytes.decode(token)
        return piece

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps a part of a character. For a control token, the bytes of its text."""
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
        """`token_bytes` as text, with U+FFFD for incomplete characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _encode_control(self, text: str, max_tokens: int | None) -> list[int]:
        ids = self._encode(self._control.substitute(text), max_tokens)
        return [self._control.real_ids.get(index, index) for index in ids]

    def _encode(self, text: str, max_tokens: int | None) -> list[int]:
        # JSON may hold half a surrogate pair, which is no character.
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
        ids: list[int] = encoding.ids  # each access makes a new list
        return ids

    def _beginning(self, text: str, max_tokens: int) -> str:
        """The text, or a beginning of it that clearly has more than `max_tokens` tokens.

        The tokens of pieces are counted, since a list of millions of ids would hold the interpreter's lock. Pieces are
        cut at any character, so the count may be a little too high.
        """
        count = 0
        for start in range(0, len(text), _COUNTED_CHARS):
            count += len(self._backend_encoding(text[start : start + _COUNTED_CHARS])) - _PER_CUT
            if count > max_tokens + max_tokens // 4:
                return text[: start + _COUNTED_CHARS]
        return text

    def _backend_encoding(self, text: str) -> Any:
        try:
            # Batched, as in `decode`. The fast variant leaves out the offsets, which are not needed.
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the package's Rust code; not an Exception
                raise
            raise TokenizerError(f"the model's tokenizer failed on a text of {len(text)} characters") from None

    def _id_of(self, name: str) -> int | None:
        return self._backend.token_to_id(self._names[name]) if name in self._names else None

    def _complete_names(self, names: dict[str, str]) -> dict[str, str]:
        """The names of special tokens, with LLaMA's usual ones for those that the files do not name."""
        for name, usual in (("bos_token", _USUAL_BOS), ("eos_token", _USUAL_EOS), ("unk_token", _USUAL_UNK)):
            found = (token for token in usual if self._backend.token_to_id(token) in self.special_ids)
            if name not in names and (token := next(found, None)):
                names = {**names, name: token}
        return names

    def _compile(self, files: TokenizerFiles) -> tuple[tuple[str, ...], ChatTemplate | None]:
        """(notes, the model's chat template). None if it is broken: such a model can still complete texts, and the
        operator can give another template."""
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
        """The bytes of a token. If a character is not part of this spelling, the UTF-8 bytes of the text."""
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
