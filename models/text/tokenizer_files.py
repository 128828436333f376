"""The files of a tokenizer → a `tokenizers.Tokenizer` with every added token in place, its names and chat template.

Knows the ways in which checkpoints store these, but not how texts are encoded. Called by `tokenizer`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from guanaco.models.errors import ModelError
from guanaco.models.formats.gguf import read_table
from guanaco.models.formats.raw_file import RawFile
from guanaco.models.formats.shown import listed
from guanaco.models.formats.small_files import MAX_TEMPLATE_FILE_BYTES, MAX_TOKENIZER_BYTES, read_small
from guanaco.models.formats.strict_json import read_json
from guanaco.models.text.gguf_tokenizer import remarks, tokenizer_files
from guanaco.models.text.sentencepiece import read_sentencepiece
from guanaco.models.text.tokenizer_notes import config_notes, file_notes, name_notes, settings_notes, template_notes

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MAX_ADDED_TOKENS = 16384  # LLaMA 3 has 256, others a few thousand. Every text is searched for all of them
_MORE_NAMES = ("additional_special_tokens", "extra_special_tokens")
TOOL_USE = "tool_use"  # the name of a chat template
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its directory describes it."""

    backend: Backend
    names: dict[str, str]  # bos_token, eos_token, … → token; only tokens of the vocabulary
    add_bos: bool | None  # whether the config asks for BOS; None: the backend decides
    adds_eos: bool  # the config asks for eos after every text
    chat_template: str | None
    tool_template: str | None  # the template for chats with tools, if there is a separate one
    notes: tuple[str, ...]


def read_tokenizer(path: Path) -> TokenizerFiles:
    """The tokenizer in the directory `path`, in the GGUF file `path`, or in the only GGUF file of the directory `path`.

    Raises ModelError if it is missing or damaged, or if an added token has another id than its file states.
    """
    config = _optional_json(path / "tokenizer_config.json")
    defaults: dict[str, str] = {}
    notes: list[str] = []
    if (path / "tokenizer.json").is_file():
        backend = _parse_backend((path / "tokenizer.json"), None)
        notes += file_notes(path, "tokenizer.json", backend)
    elif (path / "tokenizer.model").is_file():
        model = read_sentencepiece(path / "tokenizer.model")
        backend = _parse_backend(path / "tokenizer.model", json.dumps(model.tokenizer_json()))
        named = {"bos_token": model.bos_token, "eos_token": model.eos_token}
        defaults = {name: token for name, token in named.items() if token is not None}
        notes += file_notes(path, "tokenizer.model", backend)
    else:
        backend, made, gguf_notes = _read_gguf(_gguf_in(path))
        notes += gguf_notes
        if replaced := [name for name, value in config.items() if made.get(name) not in (None, value)]:
            text = "tokenizer_config.json beside the GGUF file is used where the file says otherwise"
            notes.append(f"{text}: {listed(replaced)}")
        config = made | config
    notes += [*settings_notes(backend), *config_notes(config, backend)]
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # with dropout, the ids of a text would be random
    sources = [
        (file, dict(_named_tokens(fields)))
        for file, fields in (
            ("special_tokens_map.json", _optional_json(path / "special_tokens_map.json")),
            ("tokenizer_config.json", config),
        )
    ]
    if "added_tokens_decoder" not in config:  # then the map is read last, as in transformers
        sources.reverse()
    named_tokens = sources[0][1] | sources[1][1]
    notes += name_notes(named_tokens, sources, backend)
    _add_tokens(backend, path, config, named_tokens)
    template, tool_template, more_notes = _chat_template(path, config)
    add_bos = config.get("add_bos_token")
    names = {**defaults, **{name: token for name, token in named_tokens.items() if name in NAMES}}
    return TokenizerFiles(
        backend=backend,
        names={name: token for name, token in names.items() if backend.token_to_id(token) is not None},
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        adds_eos=config.get("add_eos_token") is True,
        chat_template=template,
        tool_template=tool_template,
        notes=(*notes, *more_notes),
    )


def _read_gguf(path: Path) -> tuple[Backend, dict[str, Any], tuple[str, ...]]:
    """The tokenizer in a GGUF file, the fields of its tokenizer_config.json, and notes."""
    with closing(RawFile(path)) as file:
        metadata, _ = read_table(file)
        try:
            files, notes = tokenizer_files(metadata, str(path)), remarks(metadata)
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # values of other types
            raise ModelError(f"{path}: its tokenizer makes no sense ({error}); get the file again") from error
    return _parse_backend(path, files["tokenizer.json"]), json.loads(files["tokenizer_config.json"]), notes


def _parse_backend(path: Path, text: str | None) -> Backend:
    try:
        return Backend.from_buffer(read_small(path, MAX_TOKENIZER_BYTES)) if text is None else Backend.from_str(text)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); download it again") from error
    except Exception as error:  # the package raises nothing more specific
        raise ModelError(f"{path} cannot be read as a tokenizer ({error}); download it again") from error


def _gguf_in(path: Path) -> Path:
    candidates = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if len(candidates) != 1:
        raise ModelError(
            f"{path} has no tokenizer: a model directory needs tokenizer.json or tokenizer.model; "
            "download the model again, or copy the file from the model it was made from"
        )
    return candidates[0]


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named_tokens(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, token) pairs in special_tokens_map.json or tokenizer_config.json. A token in a list is named `LIST.TOKEN`.

    An empty token is left out: the oldest LLaMA conversions write empty texts.
    """
    for name in NAMES:
        if token := _content(fields.get(name)):
            yield name, token
    for name in _MORE_NAMES:
        listed_tokens = fields.get(name) or []
        for value in listed_tokens.values() if isinstance(listed_tokens, dict) else listed_tokens:
            if token := _content(value):
                yield f"{name}.{token}", token


def _content(value: Any) -> str | None:
    """The text of a token that is given as text, or as an object with flags."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _add_tokens(backend: Backend, path: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add the tokens that only the files beside the vocabulary have, and mark which added tokens are control tokens."""
    stated = {content: AddedToken(content, special=False) for content in _optional_json(path / "added_tokens.json")}
    ids = dict(_optional_json(path / "added_tokens.json"))
    for index, fields in (config.get("added_tokens_decoder") or {}).items():
        content = _content(fields)
        if content and str(index).isdecimal():
            flags = {flag: bool(fields[flag]) for flag in _FLAGS if flag in fields}
            stated[content], ids[content] = AddedToken(content, **flags), int(index)
    ordered = sorted(stated, key=lambda token: ids[token])
    backend.add_tokens([stated[content] for content in ordered])  # in one call: each one sorts all added tokens again
    for content in ordered:
        if backend.token_to_id(content) != ids[content]:
            raise ModelError(
                f"{path}: the added token {content!r} should have id {ids[content]}, but the vocabulary gives it "
                f"{backend.token_to_id(content)}: its tokenizer files do not belong together"
            )
    control = set(filter(None, named.values()))
    added = backend.get_added_tokens_decoder()
    if len(added) > MAX_ADDED_TOKENS:
        raise ModelError(
            f"{path}: its tokenizer has {len(added)} added tokens; at most {MAX_ADDED_TOKENS} are supported"
        )
    more_special, ends = [], _end_ids(path)
    for index, token in added.items():
        # Some fine-tunes add their turn markers as plain tokens. There, too, a user must not be able to type a turn.
        is_marker = token.content.startswith("<|") and token.content.endswith("|>")
        if not token.special and (is_marker or token.content in control or index in ends):
            more_special.append(_as_special(token))
        control.discard(token.content)
    backend.add_special_tokens(more_special)
    backend.add_special_tokens([token for token in sorted(control) if backend.token_to_id(token) is not None])


def _end_ids(path: Path) -> frozenset[int]:
    """The end ids in the model's configs. Values that are no ids are skipped here; `special_ids` refuses them."""
    named = [_optional_json(path / name).get("eos_token_id") for name in ("config.json", "generation_config.json")]
    listed = [index for value in named for index in (value if isinstance(value, list) else [value])]
    return frozenset(index for index in listed if isinstance(index, int))


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _chat_template(path: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None, list[str]]:
    """(the chat template's source, the source of the one named tool_use, notes).

    The first place that has a template counts. transformers uses tool_use for chats with tools.
    """
    places = [
        ("chat_template.jinja", _template_file(path / "chat_template.jinja")),
        ("chat_template.json", _optional_json(path / "chat_template.json").get("chat_template")),
        ("tokenizer_config.json", config.get("chat_template")),
    ]
    places = [(file, template) for file, template in places if template or (template == "" and file.endswith(".jinja"))]
    if not places:
        return None, None, []
    template, variants = places[0][1], [file.stem for file in sorted(path.glob("additional_chat_templates/*.jinja"))]
    tool_template = _template_file(path / "additional_chat_templates" / f"{TOOL_USE}.jinja")
    if isinstance(template, list):  # [{"name": "default", "template": …}, {"name": "tool_use", …}]
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        if not isinstance(template, str):
            return None, None, [f"none of the model's chat templates is the default ({listed(named)})"]
        variants += [name for name in named if name != "default"] if len(named) > 1 else []
        if len(named) > 1 and isinstance(named.get(TOOL_USE), str):
            tool_template = named[TOOL_USE]
    if not isinstance(template, str):
        return None, None, [f"the chat template of {places[0][0]} is no text and is not used"]
    variants = [name for name in variants if name != TOOL_USE or tool_template is None]
    return template, tool_template, template_notes(template, places, variants)


def _template_file(file: Path) -> str | None:
    if not file.is_file():
        return None
    try:
        return read_small(file, MAX_TEMPLATE_FILE_BYTES).decode("utf-8")
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); download it again") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} cannot be read ({error}); download it again") from error
