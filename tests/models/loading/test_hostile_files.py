"""What a model's directory may hold at worst: each file is refused within its budget, in one line, or is harmless."""

import itertools
import json
import os
import re
import signal
import struct
from pathlib import Path
from typing import Any

import pytest

from guanaco.models.architectures.config_json import parse_config, read_config
from guanaco.models.errors import ModelError, TokenizerError
from guanaco.models.formats.restricted_process import ProcessEnded, RestrictedProcess
from guanaco.models.formats.safetensors import SafetensorsFile
from guanaco.models.formats.strict_json import read_json
from guanaco.models.loading.gguf_checkpoint import GgufCheckpoint
from guanaco.models.text.control_tokens import longest_match_pattern
from guanaco.models.text.sentencepiece import read_sentencepiece
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.models.text.tokenizer_check import check_tokenizer
from guanaco.models.text.tokenizer_json import merges_from_scores
from guanaco.server.bootstrap.runtime import _generation_config
from support.models.tiny_tokenizers import write_byte_level

TERABYTE = 1 << 40


def sparse(path: Path, head: bytes = b"", size: int = TERABYTE) -> Path:
    """A file that is larger than any memory, and takes no room on the disk."""
    path.write_bytes(head)
    os.truncate(path, size)
    return path


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda path: read_config(path.parent)),
        ("generation_config.json", lambda path: _generation_config(path.parent)),
        ("tokenizer.json", lambda path: Tokenizer.from_directory(path.parent)),
        ("tokenizer.json", lambda path: check_tokenizer(path.parent)),
        ("tokenizer_config.json", lambda path: Tokenizer.from_directory(path.parent)),
        ("special_tokens_map.json", lambda path: Tokenizer.from_directory(path.parent)),
        ("added_tokens.json", lambda path: Tokenizer.from_directory(path.parent)),
        ("chat_template.jinja", lambda path: Tokenizer.from_directory(path.parent)),
        ("chat_template.json", lambda path: Tokenizer.from_directory(path.parent)),
        ("tokenizer.model", read_sentencepiece),
        ("model.safetensors.index.json", read_json),
    ],
)
def test_files_of_a_terabyte_are_refused_before_they_are_read(name: str, read: Any, tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    with pytest.raises(ModelError, match=r"larger than \d+ MiB"):
        read(sparse(tmp_path / name, b"{"))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda path: read_config(path.parent)),
        ("tokenizer.json", lambda path: Tokenizer.from_directory(path.parent)),
        ("tokenizer.model", read_sentencepiece),
        ("chat_template.jinja", lambda path: Tokenizer.from_directory(path.parent)),
        ("model.safetensors", SafetensorsFile),
        ("model.gguf", GgufCheckpoint),
    ],
)
def test_a_git_lfs_pointer_is_called_so(name: str, read: Any, tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 99\n")
    with pytest.raises(ModelError, match=rf"{name}.* a Git LFS pointer .*run `git lfs pull`"):
        read(tmp_path / name)


def test_headers_of_terabytes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not start with a safetensors header"):
        SafetensorsFile(sparse(tmp_path / "a.safetensors", struct.pack("<Q", TERABYTE >> 1)))
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    array = struct.pack("<Q1sIIQ", 1, b"k", 9, 0, TERABYTE >> 1)  # one key, half a terabyte of bytes
    with pytest.raises(ModelError, match="more than 64 MiB"):
        GgufCheckpoint(sparse(tmp_path / "a.gguf", head + array))
    text = struct.pack("<Q", TERABYTE >> 1)  # a key of half a terabyte
    with pytest.raises(ModelError, match="more than 64 MiB"):
        GgufCheckpoint(sparse(tmp_path / "b.gguf", head + text))
    tensor = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"t", 1 << 31)
    with pytest.raises(ModelError, match="dimensions"):
        GgufCheckpoint(sparse(tmp_path / "c.gguf", tensor))


@pytest.mark.parametrize(
    "text", ["[" * 1_000_000, '{"a":' * 1_000_000, '{"a": ' + "9" * 1_000_000 + "}", "[]", "\ufeff{}", '{"a": nul'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_is_deep_long_or_no_object_is_one_error(name: str, text: str, tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError):
        {
            "config.json": read_config,
            "generation_config.json": _generation_config,
            "tokenizer_config.json": Tokenizer.from_directory,
        }[name](tmp_path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match="no regular file"):
        read_config(tmp_path)


def test_shapes_that_nobody_can_multiply_are_refused(tmp_path: Path) -> None:
    huge = 10**4000
    for shape in ([huge] * 1000, [huge], [1] * 9):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        with pytest.raises(ModelError, match="header makes no sense"):
            SafetensorsFile(tmp_path / "a.safetensors")


def test_a_refusal_does_not_print_a_value_of_megabytes() -> None:
    for name in ("head_dim", "architectures", "layer_types", "num_key_value_heads"):
        with pytest.raises(ModelError, match=name) as caught:
            parse_config({name: ["x" * 1_000_000, {}]}, "config.json")
        assert len(str(caught.value)) < 1000


def test_pieces_that_take_forever_to_cut_are_refused() -> None:
    with pytest.raises(ModelError, match="50000 characters"):
        merges_from_scores(["a" * 50_000], [0.0], [True])


def test_a_gguf_whose_tokenizer_has_other_types_is_one_error(tmp_path: Path) -> None:
    from guanaco.models.text import tokenizer_files

    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": 5}
    (tmp_path / "a.gguf").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_files, "read_table", lambda _: (metadata, {}))
        with pytest.raises(ModelError, match="makes no sense"):
            tokenizer_files.read_tokenizer(tmp_path)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def with_pattern(path: Path, pattern: str) -> Path:
    """A good tokenizer whose text is first split by `pattern`."""
    write_byte_level(path)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:q|qq)+z", "(xy|xyxy)+!"])
def test_a_pattern_that_backtracks_without_end_is_refused_at_load(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be used as a tokenizer"):
        check_tokenizer(with_pattern(tmp_path, pattern))


def test_good_tokenizers_pass_and_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from guanaco.models.text import tokenizer_check
    from guanaco.models.text.tokenizer_json import SPLITS

    check_tokenizer(with_pattern(tmp_path, SPLITS["llama-bpe"].patterns[0]))
    monkeypatch.setattr(tokenizer_check, "RestrictedProcess", None)
    check_tokenizer(tmp_path)
    check_tokenizer(tmp_path / "no-such-directory")  # a GGUF file, or a SentencePiece model: their patterns are ours


def test_a_tokenizer_that_takes_too_long_or_is_none_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    with (tmp_path / "tokenizer.json").open("a") as file:
        file.write(" " * 7)  # a content that was not tried
    with pytest.raises(ModelError, match="takes more than"):
        check_tokenizer(tmp_path, probe_seconds=-1)
    with pytest.raises(ModelError, match="more than 0 s"):
        check_tokenizer(tmp_path, seconds=0)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="cannot be read"):
        check_tokenizer(tmp_path)


def test_a_tokenizer_that_breaks_down_on_a_text_is_an_error_like_others(tmp_path: Path) -> None:
    """The package's panics are no Exceptions: one would pass by every handler of the server."""
    tokenizer = Tokenizer.from_directory(with_pattern(tmp_path, "(a+)+$"))
    with pytest.raises(TokenizerError, match="301 characters"):
        tokenizer.encode("a" * 300 + "b")
    assert tokenizer.decode(tokenizer.encode("fine", add_bos=False)) == "fine"


def test_more_added_tokens_than_anybody_needs_are_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    added = {f"t{number}": 384 + number for number in range(20_000)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ModelError, match="added tokens; at most"):
        Tokenizer.from_directory(tmp_path)


def test_the_pattern_of_tokens_finds_the_longest_as_a_list_of_alternatives_does() -> None:
    tokens = ["".join(c) for n in (2, 3, 4) for c in itertools.product("ab|.", repeat=n)][::3]
    by_list = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    ours = re.compile(longest_match_pattern(tokens))
    for characters in itertools.product("ab|.", repeat=5):
        text = "".join(characters)
        assert [m[0] for m in ours.finditer(text)] == [m[0] for m in by_list.finditer(text)]
    assert re.search(longest_match_pattern([]), "anything") is None
    with pytest.raises(ModelError, match="begin with each other"):
        longest_match_pattern(["a" * n for n in range(1, 3000)])


def test_a_killed_trial_says_nothing_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel kills a process when the machine is out of memory: the operator must not search in a good file."""

    def killed(*_: object, **__: object) -> bytes:
        raise ProcessEnded("it ended", status=-signal.SIGKILL)

    monkeypatch.setattr(RestrictedProcess, "exchange", killed)
    with pytest.raises(ModelError, match="killed from outside"):
        check_tokenizer(with_pattern(tmp_path, "a unique pattern"))
