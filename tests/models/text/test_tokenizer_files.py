"""Tokenizer: the files of a model's directory, and what is told about them."""

from pathlib import Path

import pytest

from guanaco.models.errors import ModelError
from guanaco.models.text.chat_template import ChatTemplate
from guanaco.models.text.tokenizer import Tokenizer
from support.models.tiny_tokenizers import (
    as_transformers,
    edit_json,
    write_sentencepiece_like,
)


@pytest.mark.parametrize(
    "form",
    [
        "<|im_end|>",
        {"content": "<|im_end|>", "lstrip": False, "special": True, "__type": "AddedToken"},
    ],
    ids=["text", "object"],
)
def test_names_as_text_or_as_objects(form: object, files: Path) -> None:
    edit_json(files, "tokenizer_config.json", lambda c: c.update(eos_token=form))
    assert Tokenizer.from_directory(files).eos_ids == (2,)


def test_names_in_special_tokens_map(files: Path) -> None:
    edit_json(files, "tokenizer_config.json", lambda c: [c.pop(name) for name in ("bos_token", "eos_token")])
    edit_json(files, "special_tokens_map.json", lambda c: c.update(bos_token="<|endoftext|>", eos_token="<|im_end|>"))
    tokenizer = Tokenizer.from_directory(files)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (2,))


def test_empty_names_mean_llamas(tmp_path: Path) -> None:
    """decapoda-research's files."""
    path = write_sentencepiece_like(
        tmp_path, bos_token="", eos_token="", unk_token="", tokenizer_class="LLaMATokenizer"
    )
    tokenizer = Tokenizer.from_directory(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id) == (1, (2,), 0)
    assert tokenizer.encode("the")[0] == 1


def test_names_that_are_in_no_vocabulary(files: Path) -> None:
    edit_json(files, "tokenizer_config.json", lambda c: c.update(bos_token="<nope>", eos_token="<nope>"))
    tokenizer = Tokenizer.from_directory(files)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (None, (0,), 384)


def test_added_tokens_of_the_config(files: Path) -> None:
    """QLoRA's [PAD], and turn markers that a fine-tune added as plain tokens."""
    decoder = {
        "384": {"content": "[PAD]", "special": True, "normalized": False},
        "385": {"content": "<|turn|>", "special": False},
        "386": {"content": "<tool>", "special": False},
        "2": {"content": "<|im_end|>", "special": True, "normalized": False, "rstrip": True},
    }
    edit_json(files, "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder))
    tokenizer = Tokenizer.from_directory(files)
    assert tokenizer.vocab_size == 387
    assert tokenizer.special_ids == {0, 1, 2, 384, 385}
    assert tokenizer.encode("<tool>") == [386]
    assert 385 not in tokenizer.encode("a<|turn|>[PAD]")
    template = ChatTemplate("<|im_start|>[PAD]<|im_end|>  x<|turn|>{{ messages[0].content }}")
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|turn|>"}], template=template)
    assert ids[:3] == [1, 384, 2]
    assert ids.count(385) == 1
    assert tokenizer.decode(ids) == "x<|turn|>"
    assert ids == as_transformers(files).encode("<|im_start|>[PAD]<|im_end|>  x<|turn|>") + tokenizer.encode("<|turn|>")


def test_added_tokens_json(files: Path) -> None:
    edit_json(files, "added_tokens.json", lambda c: c.update({"<b>": 385, "<a>": 384}))
    assert Tokenizer.from_directory(files).encode("<a><b>") == [384, 385]


def test_added_tokens_with_other_ids_are_refused(files: Path) -> None:
    edit_json(files, "added_tokens.json", lambda c: c.update({"[PAD]": 32000}))
    with pytest.raises(ModelError, match=r"\[PAD\].*32000.*384"):
        Tokenizer.from_directory(files)


def test_settings_of_training_are_dropped(files: Path) -> None:
    """Truncation and padding that somebody saved into tokenizer.json."""
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    expected = Tokenizer.from_directory(files).encode("one two three four five six seven")
    edit_json(files, "tokenizer.json", lambda c: c.update(truncation=truncation, padding=padding))
    assert Tokenizer.from_directory(files).encode("one two three four five six seven") == expected
    assert len(Tokenizer.from_directory(files).encode("a")) == 1


CHAT = [{"role": "user", "content": "x"}]


def test_where_the_template_comes_from(files: Path) -> None:
    """chat_template.jinja before chat_template.json before tokenizer_config.json; lists by name."""

    def rendered() -> str:
        tokenizer = Tokenizer.from_directory(files)
        return tokenizer.decode(tokenizer.encode_chat(CHAT)) if tokenizer.chat_template else "; ".join(tokenizer.notes)

    edit_json(files, "tokenizer_config.json", lambda c: c.update(chat_template="config"))
    assert rendered() == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    edit_json(files, "tokenizer_config.json", lambda c: c.update(chat_template=named))
    assert rendered() == "named"
    edit_json(files, "tokenizer_config.json", lambda c: c.update(chat_template=named[:1]))
    assert rendered() == "tools"
    edit_json(
        files, "tokenizer_config.json", lambda c: c.update(chat_template=[named[0], {"name": "rag", "template": ""}])
    )
    assert "tool_use, rag" in rendered()
    edit_json(files, "chat_template.json", lambda c: c.update(chat_template="json"))
    assert rendered() == "json"
    (files / "chat_template.jinja").write_text("jinja")
    assert rendered() == "jinja"


def test_the_template_for_chats_with_tools(files: Path) -> None:
    """transformers takes the one that is named tool_use."""

    def own() -> str | None:
        template = Tokenizer.from_directory(files).tool_template
        return None if template is None else template.source

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    edit_json(files, "tokenizer_config.json", lambda c: c.update(chat_template=named))
    assert own() == "tools"
    edit_json(files, "tokenizer_config.json", lambda c: c.update(chat_template=named[:1]))
    assert own() is None, "there is one for all chats"
    edit_json(files, "tokenizer_config.json", lambda c: c.update(chat_template="config"))
    assert own() is None
    (files / "additional_chat_templates").mkdir()
    (files / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert own() == "{{ tools }}"
    (files / "additional_chat_templates" / "tool_use.jinja").write_text("{% if %}")
    assert own() is None
    assert "tool_use" in Tokenizer.from_directory(files).notes[0]


def test_a_broken_template_is_a_note(files: Path) -> None:
    (files / "chat_template.jinja").write_text("{% if %}")
    tokenizer = Tokenizer.from_directory(files)
    assert tokenizer.chat_template is None
    assert "--chat-template" in tokenizer.notes[0]
    assert tokenizer.encode("still works")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2", b'{"model": {"type": "Nope"}}', b"\xff\xfe"])
def test_damaged_files_are_one_error(content: bytes, files: Path) -> None:
    (files / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(files)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json or tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)
