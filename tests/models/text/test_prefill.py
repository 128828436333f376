"""A last message that the model goes on with, and a client's own variables: as in transformers; control stays safe."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from guanaco.models.text.chat_template import ChatTemplate, TemplateError, named_template
from guanaco.models.text.named_templates import NAMED
from guanaco.models.text.tokenizer import Tokenizer
from support.models.tiny_tokenizers import TEMPLATE_TOKENS, TEMPLATES, write_byte_level

ENDINGS = ("The answer is", "ends with a space ", "\n two\n lines \n", "x", "Hello!")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("tiny") / "t", extra=TEMPLATE_TOKENS)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Tokenizer:
    return Tokenizer.from_directory(folder)


def chat(ending: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": ending}]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_prompt_ends_as_transformers_would_end_it(tiny: Tokenizer, folder: Path, name: str) -> None:
    oracle, template = AutoTokenizer.from_pretrained(folder), ChatTemplate(TEMPLATES[name])
    for ending in ENDINGS:
        expected = oracle.apply_chat_template(
            chat(ending), chat_template=TEMPLATES[name], continue_final_message=True, return_dict=False
        )
        ids = tiny.encode_chat(
            chat(ending), template=template, add_generation_prompt=False, continue_final_message=True
        )
        assert ids == expected


@pytest.mark.parametrize("name", sorted(NAMED))
def test_our_own_templates_can_be_continued(tiny: Tokenizer, name: str) -> None:
    template = named_template(name)
    for ending in ENDINGS[:2]:
        text = tiny.decode(
            tiny.encode_chat(chat(ending), template=template, add_generation_prompt=False, continue_final_message=True),
            skip_special_tokens=False,
        )
        assert text.endswith((ending, ending.rstrip()))
    nothing = tiny.encode_chat(chat(""), template=template, add_generation_prompt=False, continue_final_message=True)
    assert nothing, "an empty answer is begun, not ended"


def test_a_control_token_in_what_is_continued_stays_text(tiny: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATES["chatml"])
    ids = tiny.encode_chat(
        chat("a<|im_end|>b"), template=template, add_generation_prompt=False, continue_final_message=True
    )
    harmless = tiny.encode_chat(chat("ab"), template=template, add_generation_prompt=False, continue_final_message=True)
    special = tiny.special_ids
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    assert tiny.decode(ids, skip_special_tokens=False).endswith("a<|im_end|>b")


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ messages[-1].content[:3] }}", "nothing"])
def test_a_template_that_drops_the_message_is_an_error(tiny: Tokenizer, source: str) -> None:
    with pytest.raises(TemplateError, match="can't be continued"):
        tiny.encode_chat(
            chat("The answer"), template=ChatTemplate(source), add_generation_prompt=False, continue_final_message=True
        )


def test_variables_reach_the_template_as_text(tiny: Tokenizer) -> None:
    template = ChatTemplate(
        "<|im_start|>{% if deep %}{{ mode }}{{ nested.list[1] }}{% endif %}{{ messages[0].content }}"
    )
    variables = {"deep": True, "mode": "a<|im_end|>", "nested": {"list": [0, 7]}, "messages": [], "bos_token": "no"}
    ids = tiny.encode_chat(chat("x")[:1], template=template, variables=variables)
    assert tiny.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|>7Hello!"
    assert len([i for i in ids if i in tiny.special_ids]) == 1
    plain = tiny.encode_chat(chat("x")[:1], template=template)
    assert tiny.decode(plain, skip_special_tokens=False) == "<|im_start|>Hello!"
