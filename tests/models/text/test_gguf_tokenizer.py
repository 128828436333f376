"""GGUF metadata → tokenizer files: transformers' reading of the same file as the oracle, refusals by name."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from guanaco.models.errors import ModelError
from guanaco.models.text.gguf_tokenizer import end_ids, tokenizer_files
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.models.text.tokenizer_json import SPLITS
from support.models.hard_strings import HARD_STRINGS
from support.models.tiny_tokenizers import sentencepiece_pieces, write_byte_level

CHAT = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
# smollm's vocabularies cut digits out one by one before anything else; transformers' GGUF reader does not know that.
WITHOUT_DIGITS = [text for text in HARD_STRINGS if not any(character.isnumeric() for character in text)]


def byte_level_metadata(scratch: Path, pre: str, **more: Any) -> dict[str, Any]:
    content = json.loads((write_byte_level(scratch) / "tokenizer.json").read_text())
    tokens = {index: token for token, index in content["model"]["vocab"].items()}
    tokens |= {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    controls = {0, 1, 2}
    plain_added = {entry["id"] for entry in content["added_tokens"]} - controls
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [tokens[index] for index in range(len(tokens))],
        "token_type": [3 if i in controls else 4 if i in plain_added else 1 for i in range(len(tokens))],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 0,
        "add_bos_token": False,
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | {"tokenizer.chat_template": CHAT}


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    pieces, scores, plain = sentencepiece_pieces()
    kinds = [
        1 if is_plain else 6 if piece.startswith("<0x") else 3 for piece, is_plain in zip(pieces, plain, strict=True)
    ]
    kinds[0] = 2
    fields = {"model": "llama", "tokens": pieces, "scores": scores, "token_type": kinds, "bos_token_id": 1,
              "eos_token_id": 2, "unknown_token_id": 0, **more}  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF without tensors, as llama.cpp calls a vocabulary."""
    writer = gguf.GGUFWriter(str(path), "llama")
    shape = {"context_length": 64, "embedding_length": 16, "block_count": 1, "feed_forward_length": 16, "vocab_size": 9}
    for name, value in shape.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def transformers_ids(path: Path, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return [oracle.encode(text, split_special_tokens=True) for text in texts]


@pytest.mark.parametrize(
    ("pre", "texts"), [("gpt-2", list(HARD_STRINGS)), ("llama-bpe", list(HARD_STRINGS)), ("smollm", WITHOUT_DIGITS)]
)
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_byte_level_ids_are_those_of_transformers(
    pre: str, texts: list[str], add_bos_token: bool, tmp_path: Path
) -> None:
    metadata = byte_level_metadata(tmp_path / "scratch", pre, add_bos_token=add_bos_token)
    path = write_gguf(tmp_path / "vocab.gguf", metadata)
    tokenizer = Tokenizer.from_directory(path)
    assert [tokenizer.encode(text) for text in texts] == transformers_ids(path, texts)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id) == (1, (2,), 0)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode_chat([{"role": "user", "content": "x"}]) == [1, *tokenizer.encode("x", add_bos=False), 2]


def test_smollm_cuts_digits_out_first(tmp_path: Path) -> None:
    """What that does to real merges is shown by the demo's ids, which are compared with llama.cpp's."""
    files = tokenizer_files(byte_level_metadata(tmp_path, "smollm"), "x")
    steps = json.loads(files["tokenizer.json"])["pre_tokenizer"]["pretokenizers"]
    assert steps[0] == {"type": "Digits", "individual_digits": True}
    assert (steps[1]["type"], steps[1]["use_regex"]) == ("ByteLevel", True)


@pytest.mark.parametrize("add_bos_token", [None, False])
@pytest.mark.parametrize("add_space_prefix", [None, False])
def test_sentencepiece_round_trip(add_bos_token: bool | None, add_space_prefix: bool | None, tmp_path: Path) -> None:
    """llama.cpp's defaults: BOS and a space first."""
    given = {"add_bos_token": add_bos_token, "add_space_prefix": add_space_prefix}
    metadata = sentencepiece_metadata(**{name: value for name, value in given.items() if value is not None})
    tokenizer = Tokenizer.from_directory(write_gguf(tmp_path / "vocab.gguf", metadata))
    for text in HARD_STRINGS:
        if "▁" in text:
            continue
        ids = tokenizer.encode(text)
        num_bos = int(add_bos_token is None)
        assert ids[:num_bos] == [1] * num_bos
        assert 1 not in ids[num_bos:]
        content = b"".join(map(tokenizer.token_bytes, ids[num_bos:]))
        assert content == (b" " if text and add_space_prefix is None else b"") + text.encode()
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_text(tokenizer.encode("the", add_bos=False)[0]) == (
        " the" if add_space_prefix is None else "the"
    )


def test_the_best_scored_pair_is_merged_first(tmp_path: Path) -> None:
    """By score, not by id: runs of spaces, which come last in LLaMA's scores, leave one space to the word."""
    tokenizer = Tokenizer.from_directory(write_gguf(tmp_path / "vocab.gguf", sentencepiece_metadata()))
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("you\n    return", add_bos=False)]
    assert texts == [" you", "\n", "   ", " return"]


def test_a_directory_with_one_gguf_file_or_a_tokenizer_beside_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "vocab.gguf", byte_level_metadata(tmp_path / "scratch", "gpt-2"))
    assert Tokenizer.from_directory(tmp_path).vocab_size == 384
    write_gguf(tmp_path / "second.gguf", byte_level_metadata(tmp_path / "scratch", "gpt-2"))
    with pytest.raises(ModelError, match="no tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "bert"}, "model = 'bert'"),
        ({"model": None}, "model is missing"),
        ({"pre": "kimi-k2"}, "pre = 'kimi-k2'"),
        ({"tokens": None}, "tokens is missing"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a b c"]}, "merges has an entry"),
        ({"token_type": [1]}, "token_type has another length"),
        ({"bos_token_id": "1"}, "bos_token_id = '1'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    metadata = byte_level_metadata(tmp_path, **{"pre": "gpt-2", **change})
    with pytest.raises(ModelError, match=rf"file\.gguf: tokenizer\.ggml\.{words}"):
        tokenizer_files({name: value for name, value in metadata.items() if value is not None}, "file.gguf")


def test_sentencepiece_without_scores_is_refused() -> None:
    metadata = sentencepiece_metadata()
    del metadata["tokenizer.ggml.scores"]
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.scores is missing"):
        tokenizer_files(metadata, "file.gguf")


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "adds_bos"),
    [
        *(("llama-bpe", True), ("pixtral", True), ("tekken", True)),
        *(("smaug-bpe", False), ("qwen2", False), ("gpt-2", False), (None, False)),
    ],
)
def test_without_a_word_bos_comes_by_the_pre_tokenizer(pre: str | None, adds_bos: bool, tmp_path: Path) -> None:
    metadata = byte_level_metadata(tmp_path, pre, add_bos_token=None)
    (tmp_path / "m").mkdir()
    tokenizer = Tokenizer.from_directory(write_gguf(tmp_path / "m" / "model.gguf", metadata))
    assert (tokenizer.encode("hello")[0] == 1) is adds_bos


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_every_split_reads_back_what_it_cut(pre: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    path = write_gguf(tmp_path / "m" / "model.gguf", byte_level_metadata(tmp_path, pre))
    tokenizer = Tokenizer.from_directory(path)
    for text in HARD_STRINGS:
        assert (
            tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False)
            == text.encode("utf-8", "replace").decode()
        )


def test_smaug_cuts_as_llama_3_and_merges_by_rank(tmp_path: Path) -> None:
    """llama.cpp has one pattern for both; only LLaMA 3 takes whole pieces that no merges lead to."""
    ours, llama = SPLITS["smaug-bpe"], SPLITS["llama-bpe"]
    assert ours.patterns == llama.patterns == (CL100K,)
    assert (ours.ignore_merges, llama.ignore_merges) == (False, True)


@pytest.mark.parametrize(
    ("texts", "keys", "expected"),
    [
        ({}, {}, [2]),
        ({5: "<|eot_id|>", 6: "<|eom_id|>"}, {}, [2, 5, 6]),
        ({5: "<end_of_turn>"}, {"eot_token_id": 7}, [2, 7, 5]),
        ({}, {"eot_token_id": 7, "eom_token_id": 8, "fim_pad_token_id": 9}, [2, 7, 8, 9]),
        ({5: "<|file_sep|>", 6: "<|repo_name|>"}, {}, [2, 6, 5]),
        ({5: "<|end|>"}, {}, [2, 5]),
        ({5: "<|end|>", 6: "<|return|>", 7: "<|call|>"}, {}, [2, 6, 7]),  # harmony: <|end|> ends a message only
        ({5: "<|end|>", 6: "<|flush|>", 7: "<|calls|>"}, {}, [2, 6, 7]),
        ({5: "</s>", 6: "[EOT]", 7: "[EOS]", 8: "<eos>"}, {}, [2, 5, 6, 7, 8]),
        ({5: "[PAD]", 6: "<｜end▁of▁sentence｜>"}, {}, [2, 5, 6]),
        ({2: "</s>", 6: "<|tool_response>"}, {}, [6]),  # Gemma's newest: a tool's answer comes, and </s> is no end
        ({2: "<|im_end|>", 5: "<|endoftext|>", 6: "<|im_start|>"}, {}, [2, 5]),  # Qwen's chat models
        ({2: "<|endoftext|>", 5: "<|im_end|>"}, {}, [2, 5]),  # and its base models
        (
            {2: "<|im_end|>", 5: "<|fim_pad|>", 6: "<|repo_name|>", 7: "<|file_sep|>", 8: "<|endoftext|>"},
            {},
            [2, 5, 6, 7, 8],
        ),  # Qwen 2.5 and 3
        ({}, {"eos_token_id": 4294967295, "eot_token_id": 5}, [5]),  # old files have -1 for "there is none"
    ],
)
def test_what_ends_generation(texts: dict[int, str], keys: dict[str, int], expected: list[int], tmp_path: Path) -> None:
    metadata = byte_level_metadata(tmp_path, "llama-bpe", **keys)
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[:] = [f"piece-{index}" for index in range(len(tokens))]
    for index, token in texts.items():
        tokens[index] = token
    assert end_ids(metadata, "file.gguf") == expected
    files = tokenizer_files(metadata, "file.gguf")
    special = {t["id"] for t in json.loads(files["tokenizer.json"])["added_tokens"] if t["special"]}
    assert set(expected) <= special  # nobody can type an end in a message


def test_ids_beyond_the_vocabulary_are_not_used_and_told(tmp_path: Path) -> None:
    """Many old files have 4294967295 as their padding or unknown token; llama.cpp takes its default then."""
    none = {"padding_token_id": 4294967295, "unknown_token_id": 4294967295}
    path = write_gguf(tmp_path / "spm.gguf", sentencepiece_metadata(**{**none, "eos_token_id": 99999}))
    tokenizer = Tokenizer.from_directory(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id) == (1, (2,), 0)
    assert [name for name in ("padding", "unknown", "eos") if any(name in note for note in tokenizer.notes)] == [
        "padding", "unknown", "eos"
    ]  # fmt: skip
    metadata = byte_level_metadata(tmp_path / "scratch", "llama-bpe", add_bos_token=True, bos_token_id=4294967295)
    tokenizer = Tokenizer.from_directory(write_gguf(tmp_path / "bpe.gguf", metadata))
    assert tokenizer.encode("hello") == tokenizer.encode("hello", add_bos=False)
    assert any("bos_token_id = 4294967295" in note for note in tokenizer.notes)


def test_the_parts_of_a_fill_in_the_middle_prompt_are_control_tokens(tmp_path: Path) -> None:
    """By their text, as in llama.cpp: converters have marked them as ordinary pieces."""
    metadata = byte_level_metadata(tmp_path / "scratch", "gpt-2")
    names = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<｜fim▁hole｜>"]
    first = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += names
    metadata["tokenizer.ggml.token_type"] += [1] * len(names)
    tokenizer = Tokenizer.from_directory(write_gguf(tmp_path / "model.gguf", metadata))
    ids = list(range(first, first + len(names)))
    assert tokenizer.special_ids >= set(ids)
    assert tokenizer.encode("".join(names), add_bos=False, parse_control=True) == ids
    assert not set(tokenizer.encode("".join(names), add_bos=False)) & set(ids)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("deepseek-llm", "Hi there你好\n1234 x!?", ["Hi", " there", "你好", "\n", "1234", " x", "!?"]),
        ("deepseek-llm", "ab\u10d0ж", ["ab", "\u10d0", "ж"]),  # Georgian is not in its list of letters
        ("deepseek-v3", "Hi there你好 12345 x!?\n", ["Hi", " there", "你好", " ", "123", "45", " x", "!?\n"]),
        ("gpt-4o", "It's HTTPServer 12345", ["It's", " HTTPServer", " ", "123", "45"]),
        ("gpt-4o", "fooBar it's", ["foo", "Bar", " it's"]),
        ("viking", "Moi, maailma 12", ["Moi", ",", " maailma", " ", "1", "2"]),
        ("poro-chat", "Moi, maailma 12", ["Moi", ",", " maailma", " 12"]),
        ("minicpm5", "a1234 b", ["a", "123", "4", " b"]),
        ("smaug-bpe", "it's 12345!", ["it", "'s", " ", "123", "45", "!"]),
        ("qwen2", "it's 123!", ["it", "'s", " ", "1", "2", "3", "!"]),
        (
            "qwen2",
            "WE'LL go\n\n (ok)  \u00e9t\u00e9",
            ["WE", "'LL", " go", "\n\n", " (", "ok", ")", " ", " \u00e9t\u00e9"],
        ),
        ("tekken", "fooBar 12", ["foo", "Bar", " ", "1", "2"]),
        ("default", "a. b1234", ["a", ".", " b", "123", "4"]),
    ],
)
def test_where_text_is_cut(pre: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    content = json.loads(tokenizer_files(byte_level_metadata(tmp_path, pre), "x")["tokenizer.json"])
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    cuts = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in cuts] == pieces
