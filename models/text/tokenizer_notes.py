"""Notes for the operator on tokenizer files that are not fully used: named tokens, settings, further templates, files.

Called by `tokenizer_files`, with the parsed files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from guanaco.models.errors import ModelError
from guanaco.models.formats.shown import joined, listed, shown
from guanaco.models.text.sentencepiece import read_sentencepiece

# Fields of tokenizer_config.json that are read, or that change neither ids nor text here (transformers, old and new).
_KNOWN = frozenset(
    {
        *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token", "chat_template"),
        *("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens", "added_tokens_decoder"),
        *("add_bos_token", "add_eos_token", "add_prefix_space", "model_max_length", "tokenizer_class", "auto_map"),
        *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "padding_side", "truncation_side", "legacy"),
        *("model_input_names", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "use_fast"),
        *("backend", "is_local", "local_files_only", "processor_class", "errors", "max_length", "stride", "padding"),
        *("truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "return_token_type_ids", "device_map"),
        *("use_default_system_prompt", "trust_remote_code", "from_slow", "split_special_tokens_in_text", "token"),
        *("padding_strategy", "pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "add_special_tokens"),
    }
)
_SPACES = ("\u2581", "\u0120")  # how SentencePiece and byte-level vocabularies write one


def settings_notes(backend: Backend) -> list[str]:
    """Notes on truncation, padding and dropout in tokenizer.json, which `tokenizer_files` then switches off."""
    found = {"truncation": backend.truncation, "padding": backend.padding}
    found["dropout"] = getattr(backend.model, "dropout", None)
    return [
        f"tokenizer.json sets {name}, which is for training: prompts are read without it"
        for name, value in found.items()
        if value
    ]


def config_notes(config: Mapping[str, Any], backend: Backend) -> list[str]:
    """Notes on fields of tokenizer_config.json that are unknown or have invalid values."""
    asks = [name for name, value in config.items() if name not in _KNOWN and value not in (None, False, [], {}, "")]
    notes = [f"tokenizer_config.json has fields that are unknown here and were ignored: {listed(asks)}"] if asks else []
    for name in ("add_bos_token", "add_eos_token"):
        if config.get(name) is not None and not isinstance(config[name], bool):
            text = f"tokenizer_config.json says {name} = {shown(config[name])}, which is neither true nor false"
            notes.append(f"{text}: the tokenizer's own rule is used")
    if config.get("auto_map"):
        notes.append("tokenizer_config.json names code of its own (auto_map): it is never run")
    wants = config.get("add_prefix_space")
    has = backend.encode("x", add_special_tokens=False).tokens[:1]
    if isinstance(wants, bool) and has and has[0].startswith(_SPACES) != wants:
        notes.append(f"tokenizer_config.json says add_prefix_space = {wants}, and the tokenizer itself does otherwise")
    return notes


def name_notes(
    named: Mapping[str, str], sources: Sequence[tuple[str, Mapping[str, str]]], backend: Backend
) -> list[str]:
    """Notes on named tokens that the vocabulary lacks, and on names that two files give to different tokens.

    named: name → token as it is used. sources: (file, its names); the last one overrides the others.
    """
    missing = [f"{name.split('.')[0]} {shown(t)}" for name, t in named.items() if backend.token_to_id(t) is None]
    notes = [f"named tokens are not in the vocabulary and are not used: {joined(missing)}"] if missing else []
    (lost_file, lost), (won_file, won) = sources
    for name in lost.keys() & won.keys():
        if lost[name] != won[name]:
            text = f"{lost_file} says {name} {shown(lost[name])}, and {won_file} says {shown(won[name])}"
            notes.append(f"{text}: the latter is used, as in transformers")
    return sorted(notes)


def template_notes(used: str, places: Sequence[tuple[str, Any]], variants: Sequence[str]) -> list[str]:
    """Notes on chat templates that are not used. used: the source of the used one. places: (file, its template), the
    used one first. variants: names of further templates."""
    notes = []
    if others := [file for file, template in places[1:] if template and template != used]:
        notes.append(f"the chat template of {places[0][0]} is used, and not that of {listed(others)}")
    if variants:
        notes.append(f"the model has more chat templates ({listed(variants)}): none of these is used")
    return notes


def file_notes(path: Path, used: str, backend: Backend) -> list[str]:
    """Notes on other tokenizers beside the file `used`. A tokenizer.model with the same vocabulary makes no note."""
    notes = []
    other = path / "tokenizer.model"
    if used == "tokenizer.json" and other.is_file() and not _has_vocabulary(other, backend):
        notes.append(
            "tokenizer.json is used, and not tokenizer.model, which has another vocabulary: remove the wrong one"
        )
    if any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")):
        notes.append(f"{used} beside the GGUF file is used, and not the tokenizer that is in the GGUF file")
    return notes


def _has_vocabulary(file: Path, backend: Backend) -> bool:
    """Whether the pieces of a SentencePiece file have the same ids as in `backend`. False if it can't be read."""
    try:
        pieces = read_sentencepiece(file).pieces
    except ModelError:
        return False
    ids = backend.get_vocab(with_added_tokens=True)
    return all(ids.get(piece) == index for index, piece in enumerate(pieces))
