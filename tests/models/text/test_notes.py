"""Whatever a tokenizer's files say and nothing uses is told in the tokenizer's notes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from guanaco.models.text.gguf_tokenizer import remarks
from guanaco.models.text.tokenizer import Tokenizer
from support.models.tiny_tokenizers import write_byte_level

TEMPLATE = "{{ messages[0].content }}"
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool\x1b[2J", "template": "x"}]
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 8},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("tokenizer") / "t", chat_template=TEMPLATE)


def edited(file: str, **fields: Any) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        known = json.loads((path / file).read_text()) if (path / file).exists() else {}
        (path / file).write_text(json.dumps(known | fields))

    return edit


def config(**fields: Any) -> Callable[[Path], object]:
    return edited("tokenizer_config.json", **fields)


def dropout(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (path / "tokenizer.json").write_text(json.dumps(content))


def more_templates(path: Path) -> None:
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("x")


def file(name: str, text: str = "x") -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


CASES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "truncation": (edited("tokenizer.json", truncation=TRUNCATION), "sets truncation"),
    "padding": (edited("tokenizer.json", padding=PADDING), "sets padding"),
    "dropout": (dropout, "sets dropout"),
    "no such token": (config(pad_token="\x1b[2J" + "x" * 999), "pad_token '\\x1b[2J"),
    "no such token in a list": (config(additional_special_tokens=["<|none|>"]), "additional_special_tokens '<|none|>'"),
    "bos as a number": (config(add_bos_token=1), "add_bos_token = 1"),
    "eos as text": (config(add_eos_token="true"), "add_eos_token = 'true'"),
    "no word on bos": (config(add_bos_token=None), None),
    "unknown field": (config(do_lower_case=True, x=0, split_special_tokens=True), "split_special_tokens"),
    "code": (config(auto_map={"AutoTokenizer": ["x.Y", None]}), "never run"),
    "prefix space": (config(add_prefix_space=True), "add_prefix_space = True"),
    "no prefix space": (config(add_prefix_space=False), None),
    "two names": (edited("special_tokens_map.json", eos_token="<|endoftext|>"), "<|endoftext|>"),
    "two equal names": (edited("special_tokens_map.json", eos_token={"content": "<|im_end|>"}), None),
    "default of several": (config(chat_template=NAMED), "tool\\x1b[2J"),
    "no default of several": (config(chat_template=[{**NAMED[0], "name": "a"}, NAMED[1]]), "none of the model's"),
    "a template that is no text": (config(chat_template={"a": 1}), "no text"),
    "more in a folder": (more_templates, "rag"),
    "two places": (file("chat_template.jinja"), "not that of tokenizer_config.json"),
    "two places, one template": (file("chat_template.jinja", TEMPLATE), None),
    "a second vocabulary": (file("tokenizer.model"), "not tokenizer.model"),
    "a GGUF file": (file("m.gguf"), "not the tokenizer that is in the GGUF file"),
    "nothing": (file("README.md"), None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_used_is_told(case: str, original: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(original, tmp_path / "t"))
    change, part = CASES[case]
    change(path)
    notes = Tokenizer.from_directory(path).notes
    assert len(notes) == (part is not None), notes
    if part is not None:
        assert part in notes[0]
        assert notes[0].isprintable()
        assert len(notes[0]) < 500


@pytest.mark.parametrize(("decoder", "ends"), [({}, 2), (None, 0)], ids=["new files", "old files"])
def test_which_file_names_a_token(decoder: Any, ends: int, original: Path, tmp_path: Path) -> None:
    """As in transformers: special_tokens_map.json counts only where tokenizer_config.json lists no added tokens."""
    path = Path(shutil.copytree(original, tmp_path / "t"))
    config(eos_token="<|im_end|>", **({} if decoder is None else {"added_tokens_decoder": decoder}))(path)
    edited("special_tokens_map.json", eos_token="<|endoftext|>")(path)
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.eos_ids == (ends,) == (AutoTokenizer.from_pretrained(path).eos_token_id,)
    assert "as in transformers" in tokenizer.notes[0]


def test_special_tokens_of_both_lists_are_control_tokens(original: Path, tmp_path: Path) -> None:
    """A list in one file must not hide that of the other one: nobody may type its tokens."""
    path = Path(shutil.copytree(original, tmp_path / "t"))
    vocab = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    words = [word for word in sorted(vocab) if len(word) > 2 and word.isalpha()][:2]
    config(additional_special_tokens=words[:1])(path)
    edited("special_tokens_map.json", additional_special_tokens=words[1:])(path)
    tokenizer = Tokenizer.from_directory(path)
    assert [tokenizer.control_id(word) for word in words] == [vocab[word] for word in words]
    assert len(words) == 2


def test_dropout_is_switched_off(original: Path, tmp_path: Path) -> None:
    """It would cut the same text differently each time."""
    path = Path(shutil.copytree(original, tmp_path / "t"))
    text = "the quick brown fox and the lazy dog " * 5
    expected = Tokenizer.from_directory(path).encode(text)
    dropout(path)
    assert Tokenizer.from_directory(path).encode(text) == expected


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"tokenizer.chat_template": "x", "tokenizer.chat_template.tool_use": "y"}, None),
        ({"tokenizer.chat_template": "x", "tokenizer.chat_template.rag": "y"}, "tokenizer.chat_template.rag"),
        ({"tokenizer.chat_template.rag": "y", "tokenizer.chat_templates": ["rag"]}, "none is used"),
        ({"tokenizer.ggml.precompiled_charsmap": [1], "tokenizer.\x1b": "x"}, "precompiled_charsmap, tokenizer.\\x1b"),
        ({"tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.unknown_flag": False}, None),
    ],
)
def test_keys_of_a_gguf_file(metadata: dict[str, Any], part: str | None) -> None:
    notes = remarks({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"], **metadata})
    assert len(notes) == (part is not None)
    assert part is None or part in notes[0]
