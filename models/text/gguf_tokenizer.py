"""A GGUF file's tokenizer metadata → the tokenizer files of a Hugging Face directory.

Knows the metadata's keys (llama.cpp's), not the rest of the file. Called by the demo's conversion, and by
`tokenizer_files` for a GGUF file that is served.
"""

import json
from collections.abc import Mapping
from typing import Any

from guanaco.models.errors import ModelError
from guanaco.models.formats.shown import listed
from guanaco.models.text.tokenizer_json import SPLITS, AddedToken, byte_level_json, sentencepiece_json

# Keys below `tokenizer.ggml.` that are read, or change nothing for a tokenizer that is supported.
_READ = frozenset(
    {
        *("model", "tokens", "token_type", "scores", "merges", "pre", "add_bos_token", "add_eos_token"),
        *("add_space_prefix", "token_type_count", "remove_extra_whitespaces", "add_sep_token"),
    }
)
_VARIANT = "tokenizer.chat_template."  # followed by the name of a further template, such as "tool_use"

# llama.cpp's token types: `tokenizer.ggml.token_type`.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
SPLIT_KEY = "tokenizer.ggml.pre"

# The texts of tokens that end generation in llama.cpp, whatever their type. Further ends are in `_END_KEYS`.
_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>"),
    )
)
# Key of the metadata that names an end → the texts of a token that counts as this end if the key is absent.
_END_KEYS = {
    "eos": (),
    "eot": (),
    "eom": (),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Control tokens by their text, whatever their type: the three parts of a fill-in-the-middle prompt.
_MIDDLE = frozenset(
    f"{left}{part}{right}"
    for left, right, parts in (
        *(("<|fim_", "|>", ("prefix", "suffix", "middle")), ("<fim_", ">", ("prefix", "suffix", "middle"))),
        *(("<fim-", ">", ("prefix", "suffix", "middle")), ("<", ">", ("PRE", "SUF", "MID"))),
        *(("▁<", ">", ("PRE", "SUF", "MID")), ("<|code_", "|>", ("prefix", "suffix", "middle"))),
        *(("<|", "|>", ("prefix", "suffix", "middle")), ("<｜fim▁", "｜>", ("begin", "hole", "end"))),
    )
    for part in parts
)
# In OpenAI's harmony format, <|end|> ends a message but not the turn. Gemma's newest tool format does not end at </s>.
# As in llama.cpp: if the ends hold one token of each set, the token after the sets is no end.
_NO_ENDS = (
    (({"<|call|>", "<|calls|>"}, {"<|return|>", "<|flush|>"}), "<|end|>"),
    (({"<|tool_response>"},), "</s>"),
)
# The ids of named tokens in a SentencePiece vocabulary whose file names none, as in llama.cpp.
_LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}

_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    """`tokenizer.json` and `tokenizer_config.json` as text. `source` names the file in messages.

    Raises ModelError, which names the key, for a kind of tokenizer that is not supported.
    """
    reader = _Reader(metadata, source)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one class of transformers that takes the file as it is
        "add_bos_token": reader.adds_bos,
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        **{name: reader.tokens[index] for name, key in _NAMED.items() if (index := reader.id_of(key)) is not None},
    }
    length_key = f"{metadata.get('general.architecture', 'llama')}.context_length"
    if length_key in metadata:
        fields["model_max_length"] = metadata[length_key]
    if "tokenizer.chat_template" in metadata:
        fields["chat_template"] = metadata["tokenizer.chat_template"]
        if isinstance(for_tools := metadata.get(_VARIANT + "tool_use"), str):
            named = {"default": fields["chat_template"], "tool_use": for_tools}
            fields["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    return {
        "tokenizer.json": json.dumps(reader.tokenizer_json(), ensure_ascii=False, separators=(",", ":")) + "\n",
        "tokenizer_config.json": json.dumps(fields, ensure_ascii=False, indent=2) + "\n",
    }


def end_ids(metadata: Mapping[str, Any], source: str) -> list[int]:
    """The ids that end generation by llama.cpp's rules: ids that keys name, and tokens with a well-known text."""
    if "tokenizer.ggml.tokens" not in metadata:  # a file without a tokenizer may still name ids
        named = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _END_KEYS)
        return list(dict.fromkeys(index for index in named if index is not None))
    return _Reader(metadata, source).end_ids()


def remarks(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes for the operator on tokenizer metadata that are not used or missing."""
    notes = []
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    for key, value in metadata.items():
        is_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and isinstance(value, int)
        if is_id and not 0 <= value < num_tokens:
            notes.append(f"the GGUF file says {listed([key])} = {value}, which no token has: it is not used")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and not metadata.get(SPLIT_KEY):
        notes.append(f"the GGUF file has no {SPLIT_KEY}: text is cut by llama.cpp's default rule")
    used_variant = _VARIANT + "tool_use" if "tokenizer.chat_template" in metadata else ""
    if variants := [key for key in metadata if key.startswith(_VARIANT) and key != used_variant]:
        used = "tokenizer.chat_template is used" if "tokenizer.chat_template" in metadata else "none is used"
        notes.append(f"the GGUF file has chat templates besides its default: {listed(variants)}; {used}")
    asks = [key for key, value in metadata.items() if _is_unread(key) and value not in (None, False, "", [])]
    if asks:
        notes.append(f"the GGUF file has tokenizer keys that are unknown here and were ignored: {listed(asks)}")
    return tuple(notes)


def _is_unread(key: str) -> bool:
    """Whether a tokenizer key is not read here although it may change ids."""
    if key.startswith((_VARIANT, "tokenizer.chat_template", "tokenizer.huggingface.")) or key.endswith("_token_id"):
        return False
    return key.startswith("tokenizer.") and key.removeprefix("tokenizer.ggml.") not in _READ


class _Reader:
    """Reads the metadata with their defaults. Every refusal names the key."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source
        self.model = self._get("model")
        self.tokens: list[str] = self._get("tokens")
        self.types: list[int] = self._get("token_type", [_NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise self._refusal("token_type", "has another length than the vocabulary; get the file again")
        # Files from before the key existed lack it; llama.cpp uses "default" for them.
        self.split = str(self._get("pre", "") or "default")
        known = SPLITS.get(self.split)
        default = self.model == "llama" or (self.model == "gpt2" and known is not None and known.adds_bos)
        self.adds_bos = bool(self._get("add_bos_token", default)) and self.id_of("bos") is not None

    def id_of(self, key: str) -> int | None:
        """The id of a named special token; None if the file names none.

        As in llama.cpp, an id beyond the vocabulary counts as none: old files write 4294967295 for it.
        """
        default = _LLAMA_IDS.get(key) if self.model == "llama" and len(self.tokens) > max(_LLAMA_IDS.values()) else None
        index = self._get(f"{key}_token_id", default)
        if index is not None and type(index) is not int:
            raise self._refusal(f"{key}_token_id", f"= {index!r} is no token id; get the file again")
        if index is not None and not 0 <= index < len(self.tokens):
            index = default
        return index

    def end_ids(self) -> list[int]:
        """As the module's `end_ids`. The ids that keys name come first."""
        by_text = {token: index for index, token in enumerate(self.tokens)}
        ends = []
        for key, texts in _END_KEYS.items():
            found = next((by_text[text] for text in texts if text in by_text), None)
            ends.append(self.id_of(key) if self.id_of(key) is not None else found)
        ends += [by_text[text] for text in sorted(_ENDS & by_text.keys(), key=by_text.__getitem__)]
        ids = list(dict.fromkeys(index for index in ends if index is not None))
        ended = {self.tokens[index] for index in ids}
        spared = {token for groups, token in _NO_ENDS if all(group & ended for group in groups)}
        return [index for index in ids if self.tokens[index] not in spared]

    def tokenizer_json(self) -> dict[str, Any]:
        kinds = {_CONTROL: True, _USER_DEFINED: False}
        # These are control tokens in llama.cpp, whatever their type. The eos of a SentencePiece vocabulary is control
        # already, by its name.
        control = set(self.end_ids()) - ({self.id_of("eos")} if self.model == "llama" else set())
        control.update(index for index, token in enumerate(self.tokens) if token in _MIDDLE)
        added = [
            AddedToken(index, token, index in control or kinds[kind])
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in kinds or index in control
        ]
        bos_id = self.id_of("bos") if self.adds_bos else None
        bos = None if bos_id is None else AddedToken(bos_id, self.tokens[bos_id], True)
        if self.model == "gpt2":
            if self.split not in SPLITS:
                raise self._refusal("pre", f"= {self.split!r} is not supported: give the model as safetensors")
            return byte_level_json(self._vocab(), self._merges(), added, split=self.split, bos=bos)
        if self.model == "llama":
            return sentencepiece_json(
                self.tokens,
                self._get("scores"),
                [kind == _NORMAL for kind in self.types],
                added,
                add_prefix_space=bool(self._get("add_space_prefix", True)),
                bos=bos,
            )
        raise self._refusal("model", f"= {self.model!r} is not supported: give the model as safetensors")

    def _vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def _merges(self) -> list[tuple[str, str]]:
        merges = [tuple(merge.split(" ")) for merge in self._get("merges")]
        if any(len(merge) != 2 for merge in merges):
            raise self._refusal("merges", "has an entry that is no pair; get the file again")
        return [(left, right) for left, right in merges]

    def _get(self, key: str, *default: Any) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is not None:
            return value
        if default:
            return default[0]
        raise self._refusal(key, "is missing; the file has no tokenizer: get another one")

    def _refusal(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self._source}: tokenizer.ggml.{key} {problem}")
