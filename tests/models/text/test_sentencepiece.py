"""A `tokenizer.model` written by hand, field by field: what is read, and what is refused."""

import struct
from pathlib import Path

import pytest

from guanaco.models.errors import ModelError
from guanaco.models.text.sentencepiece import read_sentencepiece
from guanaco.models.text.tokenizer import Tokenizer
from support.models.tiny_tokenizers import sentencepiece_pieces


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def data(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def piece(text: str, score: float, kind: int) -> bytes:
    body = data(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
    return data(1, body + (number(3, kind) if kind != 1 else b""))


def model(*, trainer: bytes = b"", normalizer: bytes = b"", bos: int = 1, pieces: bytes | None = None) -> bytes:
    """LLaMA's settings around the tiny vocabulary. Later fields win, as in protobuf."""
    if pieces is None:
        texts, scores, plain = sentencepiece_pieces()
        kinds = [1 if p else 6 if t.startswith("<0x") else 3 for t, p in zip(texts, plain, strict=True)]
        kinds[0] = 2
        pieces = b"".join(map(piece, texts, scores, kinds))
    trainer = number(3, 2) + number(35, 1) + number(40, 0) + number(41, bos) + number(42, 2) + number(43, -1) + trainer
    return pieces + data(2, trainer) + data(3, data(1, b"identity") + number(3, 1) + number(4, 0) + normalizer)


def write(path: Path, content: bytes) -> Path:
    (path / "tokenizer.model").write_bytes(content)
    return path / "tokenizer.model"


def test_reads_pieces_and_settings(tmp_path: Path) -> None:
    read = read_sentencepiece(write(tmp_path, model()))
    assert (read.pieces, read.scores) == sentencepiece_pieces()[:2]
    assert (read.bos_token, read.eos_token) == ("<s>", "</s>")
    assert read.add_dummy_prefix
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id) == (1, (2,), 0)
    assert tokenizer.token_text(tokenizer.encode("hello")[1]) == " hello"


def test_unknown_fields_are_skipped(tmp_path: Path) -> None:
    """Of every wire type: the format grows."""
    extra = number(900, 7) + data(901, b"x") + varint(902 << 3 | 1) + b"8bytes!!" + varint(903 << 3 | 5) + b"four"
    assert read_sentencepiece(write(tmp_path, extra + model(trainer=extra) + extra)).pieces[1] == "<s>"


def test_a_model_without_bos(tmp_path: Path) -> None:
    write(tmp_path, model(bos=-1))
    assert read_sentencepiece(tmp_path / "tokenizer.model").bos_token is None
    assert Tokenizer.from_directory(tmp_path).encode("hello")[0] != 1


def test_no_space_in_front(tmp_path: Path) -> None:
    write(tmp_path, model(normalizer=number(3, 0)))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.token_text(tokenizer.encode("hello")[1]) == "hello"
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_user_defined_pieces_are_found_first(tmp_path: Path) -> None:
    texts, scores, plain = sentencepiece_pieces()
    kinds = [1 if p else 6 if t.startswith("<0x") else 3 for t, p in zip(texts, plain, strict=True)]
    pieces = b"".join(map(piece, [*texts, "<sep>"], [*scores, 0.0], [*kinds, 4]))
    write(tmp_path, model(pieces=pieces))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert len(texts) in tokenizer.encode("the<sep>name")
    assert len(texts) not in tokenizer.special_ids


def test_no_merge_makes_a_control_piece(tmp_path: Path) -> None:
    """`</` and `s>` are pieces of LLaMA's; put together in text they are not the end of it."""
    texts, scores, plain = sentencepiece_pieces()
    kinds = [1 if p else 6 if t.startswith("<0x") else 3 for t, p in zip(texts, plain, strict=True)]
    pieces = b"".join(map(piece, [*texts, "</", "s>"], [*scores, -0.1, -0.2], [*kinds, 1, 1]))
    write(tmp_path, model(pieces=pieces))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("a</s>b", add_bos=False).count(2) == 0
    assert {len(texts), len(texts) + 1} <= set(tokenizer.encode("a</s>b"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (model(trainer=number(3, 1)), "model_type"),
        (model(trainer=number(35, 0)), "byte_fallback"),
        (model(normalizer=data(2, b"map")), "precompiled_charsmap"),
        (model(normalizer=number(4, 1)), "remove_extra_whitespaces"),
        (b"", "no SentencePiece"),
        (model()[:-3], "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\xff" * 20, "no SentencePiece"),
        (b"\x0a", "no SentencePiece"),
        (data(1, number(1, 5)), "other types"),
        (data(1, data(1, b"\xff\xff")), "no SentencePiece"),
    ],
)
def test_what_is_not_llamas_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        read_sentencepiece(write(tmp_path, content))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_sentencepiece(tmp_path)
