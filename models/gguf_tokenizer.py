"""A GGUF file's tokenizer metadata → the tokenizer files of a Hugging Face directory.

Knows the metadata's keys (llama.cpp's), not the file around them. Called by the demo's conversion, and by `Tokenizer`
for a GGUF that is served as it is.
"""

import json
from collections.abc import Mapping
from typing import Any

from guanaco.models.errors import ModelError
from guanaco.models.tokenizer_json import AddedToken, byte_level_json, knows_split, sentencepiece_json

# llama.cpp's token types: `tokenizer.ggml.token_type`.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    """`tokenizer.json` and `tokenizer_config.json` as text. `source` names the file in messages.

    Raises ModelError for a kind of tokenizer that is not known here, by the name of the key.
    """
    reader = _Reader(metadata, source)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one class of transformers that takes the file as it is
        "add_bos_token": reader.adds_bos,
        "clean_up_tokenization_spaces": False,
        **{name: reader.tokens[index] for name, key in _NAMED.items() if (index := reader.id_of(key)) is not None},
    }
    if "llama.context_length" in metadata:
        fields["model_max_length"] = metadata["llama.context_length"]
    if "tokenizer.chat_template" in metadata:
        fields["chat_template"] = metadata["tokenizer.chat_template"]
    return {
        "tokenizer.json": json.dumps(reader.tokenizer_json(), ensure_ascii=False, separators=(",", ":")) + "\n",
        "tokenizer_config.json": json.dumps(fields, ensure_ascii=False, indent=2) + "\n",
    }


class _Reader:
    """The metadata with their defaults; every refusal names the key."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source
        self.model = self._get("model")
        self.tokens: list[str] = self._get("tokens")
        self.types: list[int] = self._get("token_type", [_NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise self._refusal("token_type", "has another length than the vocabulary; get the file again")
        # llama.cpp adds BOS to a SentencePiece vocabulary that does not say otherwise.
        self.adds_bos = bool(self._get("add_bos_token", self.model == "llama")) and self.id_of("bos") is not None

    def id_of(self, key: str) -> int | None:
        """The id of a named special token, None where the file names none."""
        index = self._get(f"{key}_token_id", None)
        if index is not None and not 0 <= index < len(self.tokens):
            raise self._refusal(f"{key}_token_id", f"= {index} is outside of the vocabulary; get the file again")
        return None if index is None else int(index)

    def tokenizer_json(self) -> dict[str, Any]:
        kinds = {_CONTROL: True, _USER_DEFINED: False}
        added = [
            AddedToken(index, token, kinds[kind])
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in kinds
        ]
        bos_id = self.id_of("bos") if self.adds_bos else None
        bos = None if bos_id is None else AddedToken(bos_id, self.tokens[bos_id], True)
        if self.model == "gpt2":
            split = self._get("pre", "")
            if not knows_split(split):
                raise self._refusal("pre", f"= {split!r} is not supported: give the model as safetensors")
            return byte_level_json(self._vocab(), self._merges(), added, split=split, bos=bos)
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
