"""A SentencePiece `tokenizer.model` → an equivalent `tokenizer.json`, for checkpoints that have no tokenizer.json.

Reads the few protobuf fields that it needs without a package: the format is small.
Called by `tokenizer_files`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guanaco.models.errors import ModelError
from guanaco.models.formats.small_files import MAX_SENTENCEPIECE_BYTES, read_small
from guanaco.models.text.tokenizer_json import AddedToken, sentencepiece_json

# sentencepiece_model.proto: field numbers and enum values.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BPE = 2
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_TRAINER_MODEL_TYPE, _TRAINER_BYTE_FALLBACK, _TRAINER_BOS_ID, _TRAINER_EOS_ID = 3, 35, 41, 42
_NORMALIZER_CHARSMAP, _NORMALIZER_DUMMY_PREFIX, _NORMALIZER_EXTRA_SPACES = 2, 3, 4

_Value = int | bytes


@dataclass
class SentencePieceModel:
    """The fields of the file, with the format's defaults."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = 1
    byte_fallback: bool = False
    bos_id: int = 1
    eos_id: int = 2
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @property
    def bos_token(self) -> str | None:
        """The piece that begins a text; None if the model has none."""
        return self.pieces[self.bos_id] if 0 <= self.bos_id < len(self.pieces) else None

    @property
    def eos_token(self) -> str | None:
        """The piece that ends a text; None if the model has none."""
        return self.pieces[self.eos_id] if 0 <= self.eos_id < len(self.pieces) else None

    def tokenizer_json(self) -> dict[str, Any]:
        """The same tokenizer for the `tokenizers` package. It puts BOS first, as LLaMA's own code does."""
        special = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
        added = [
            AddedToken(index, piece, special[kind])
            for index, (piece, kind) in enumerate(zip(self.pieces, self.types, strict=True))
            if kind in special
        ]
        bos = None if self.bos_token is None else AddedToken(self.bos_id, self.bos_token, True)
        plain = [kind == _NORMAL for kind in self.types]
        return sentencepiece_json(
            self.pieces, self.scores, plain, added, add_prefix_space=self.add_dummy_prefix, bos=bos
        )


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in `path`. Raises ModelError if the file is damaged, or is not a BPE with byte fallback as LLaMA's."""
    try:
        model = _parse(read_small(path, MAX_SENTENCEPIECE_BYTES))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from error
    except (ValueError, IndexError, struct.error) as error:
        raise ModelError(f"{path} is no SentencePiece model ({error}); download it again") from error
    refused = {
        "model_type": model.model_type != _BPE,
        "byte_fallback": not model.byte_fallback,
        "precompiled_charsmap": bool(model.charsmap),
        "remove_extra_whitespaces": model.remove_extra_whitespaces,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ModelError(f"{path}: its {name} is not LLaMA's, which is not supported: give a tokenizer.json")
    return model


def _parse(data: bytes) -> SentencePieceModel:
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == _PIECES and isinstance(value, bytes):
            piece = dict(_fields(value))
            text, score = piece.get(_PIECE_TEXT, b""), piece.get(_PIECE_SCORE, b"\0\0\0\0")
            if not isinstance(text, bytes) or not isinstance(score, bytes):
                raise ValueError("a piece has fields of other types")
            model.pieces.append(text.decode("utf-8"))
            model.scores.append(struct.unpack("<f", score)[0])
            model.types.append(int(piece.get(_PIECE_TYPE, _NORMAL)))
        elif number == _TRAINER and isinstance(value, bytes):
            trainer = dict(_fields(value))
            model.model_type = int(trainer.get(_TRAINER_MODEL_TYPE, model.model_type))
            model.byte_fallback = bool(trainer.get(_TRAINER_BYTE_FALLBACK, False))
            model.bos_id = _signed(trainer.get(_TRAINER_BOS_ID, model.bos_id))
            model.eos_id = _signed(trainer.get(_TRAINER_EOS_ID, model.eos_id))
        elif number == _NORMALIZER and isinstance(value, bytes):
            normalizer = dict(_fields(value))
            charsmap = normalizer.get(_NORMALIZER_CHARSMAP, b"")
            model.charsmap = charsmap if isinstance(charsmap, bytes) else b"?"
            model.add_dummy_prefix = bool(normalizer.get(_NORMALIZER_DUMMY_PREFIX, True))
            model.remove_extra_whitespaces = bool(normalizer.get(_NORMALIZER_EXTRA_SPACES, True))
    if not model.pieces:
        raise ValueError("it holds no pieces")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """(field number, value) of a protobuf message: an int for a varint, bytes for everything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError("it is truncated")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")


def _signed(value: _Value) -> int:
    """An int32 from protobuf's encoding, in which negative numbers are 64-bit complements."""
    number = int(value) if isinstance(value, int) else -1
    return number - (1 << 64) if number >= 1 << 63 else number
