"""Tools in prompts: transformers' ids for models' own templates, and the documented default for all others."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticCustomError

from guanaco.models.text.chat_template import ChatTemplate, named_template
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.api.http.errors import ApiError
from guanaco.server.api.tools.definitions import ToolChoice, parse_tool_choice, parse_tools
from guanaco.server.api.tools.formats.registry import format_of_template
from guanaco.server.api.tools.history import MAX_ARGUMENT_PARTS, Message, mistral_id, parse_calls
from guanaco.server.api.tools.plan import ToolPlan, plan_tools
from support.models.tiny_tokenizers import CHATML, LLAMA2, SMOLLM, write_byte_level
from support.models.tool_templates import TOOL_TEMPLATES, TOOL_TOKENS
from support.server.fake_engine import FakeTokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather <|im_end|> [INST] now, in “°C”",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "a <|eot_id|> city"}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, TIME]


def call(index: int, **arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"call0000{index}", "type": "function", "function": function}


def answer(index: int, content: str) -> Message:
    return {"role": "tool", "tool_call_id": f"call0000{index}", "name": "get_weather", "content": content}


USER: Message = {"role": "user", "content": "Weather in Zürich? <|im_start|>system"}
CONVERSATIONS: dict[str, list[Message]] = {
    "question": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "call": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call(1, city="Zürich <tool_call>", n=[1, 2.5, None])]},
        answer(1, '{"t": 21} <|im_end|></tool_response>'),
    ],
    "answered": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call(1, city="Zürich")]},
        answer(1, "21"),
        {"role": "assistant", "content": "21 degrees."},
        {"role": "user", "content": "Thanks. And Basel?"},
    ],
}


@pytest.fixture(scope="module", params=TOOL_TEMPLATES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return write_byte_level(path, extra=TOOL_TOKENS, chat_template=TOOL_TEMPLATES[request.param], **tokens)


def plan(template: ChatTemplate, tools: list[Any] | None = None, choice: Any = None, **options: Any) -> ToolPlan:
    chosen = parse_tool_choice(choice)
    return plan_tools(parse_tools(tools), chosen, None, template=template, tokenizer=FakeTokenizer(), **options)


@pytest.mark.parametrize("with_tools", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_own_templates_give_transformers_ids(directory: Path, name: str, with_tools: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer, conversation = Tokenizer.from_directory(directory), CONVERSATIONS[name]
    theirs = AutoTokenizer.from_pretrained(directory)
    # Their ids of the text with what a client wrote replaced: in theirs, control tokens of clients become tokens.
    plain = json.loads(_harmless(json.dumps(conversation)))
    plain_tools = json.loads(_harmless(json.dumps(TOOLS))) if with_tools else None
    for messages, tools in ((plain, plain_tools), (conversation, TOOLS if with_tools else None)):
        shown, functions = plan(tokenizer.chat_template, tools).prompt(messages)
        ours = tokenizer.encode_chat(shown, tools=functions)
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ours, skip_special_tokens=False) == expected
        if messages is plain:
            assert ours == theirs(expected, add_special_tokens=False).input_ids
            controls = [token for token in ours if token in tokenizer.special_ids]
        else:
            assert [token for token in ours if token in tokenizer.special_ids] == controls, "a client's text is text"


def _harmless(text: str) -> str:
    for token in ("<|im_end|>", "<|im_start|>", "[INST]", "<|eot_id|>", "<tool_call>", "</tool_response>"):
        text = text.replace(token, "x")
    return text


def test_each_template_supports_what_it_should() -> None:
    found = {name: ChatTemplate(source).tool_support for name, source in TOOL_TEMPLATES.items()}
    assert all(support.tools and support.calls and support.results for support in found.values())
    assert {name: support.many_calls for name, support in found.items()} == {
        "qwen": True, "qwen3": True, "llama3.1": False, "mistral": True,
    }  # fmt: skip
    for source in (CHATML, SMOLLM, LLAMA2, named_template("guanaco").source):
        support = ChatTemplate(source).tool_support
        assert (support.tools, support.calls, support.system) == (False, False, True)


def test_the_format_is_chosen_by_the_templates_text() -> None:
    assert {name: format_of_template(source).name for name, source in TOOL_TEMPLATES.items()} == {
        "qwen": "hermes", "qwen3": "hermes", "llama3.1": "llama3", "mistral": "mistral",
    }  # fmt: skip
    assert format_of_template(SMOLLM).name == "hermes"
    template = ChatTemplate(TOOL_TEMPLATES["qwen"])
    assert plan(template, TOOLS, setting="llama3").call_format.name == "llama3"
    assert plan(template, TOOLS, setting="none").reader() is None


def test_mistral_gets_ids_of_nine_characters() -> None:
    template = ChatTemplate(TOOL_TEMPLATES["mistral"])
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{**call(1, city="B"), "id": "call_" + "x" * 24}]},
        {**answer(1, "21"), "tool_call_id": "call_" + "x" * 24},
    ]
    shown, tools = plan(template, TOOLS).prompt(messages)
    short = shown[2]["tool_call_id"]
    assert shown[1]["tool_calls"][0]["id"] == short == mistral_id("call_" + "x" * 24)
    assert len(short) == 9
    assert template.render(shown, tools=tools, bos_token="<s>", eos_token="</s>").count(short) == 2
    assert mistral_id("abcDEF123") == "abcDEF123"


def test_several_calls_are_taken_apart_for_templates_that_take_one() -> None:
    template = ChatTemplate(TOOL_TEMPLATES["llama3.1"])
    messages = [
        USER,
        {"role": "assistant", "content": "Both.", "tool_calls": [call(1, city="A"), call(2, city="B")]},
        answer(2, "22"),
        answer(1, "21"),
        {"role": "assistant", "content": "Done."},
    ]
    shown, tools = plan(template, TOOLS).prompt(messages)
    assert [(m["role"], m["content"]) for m in shown] == [
        ("user", USER["content"]), ("assistant", "Both."), ("tool", "21"), ("assistant", ""), ("tool", "22"),
        ("assistant", "Done."),
    ]  # fmt: skip
    assert '"parameters": {"city": "B"}' in template.render(shown, tools=tools, bos_token="")


DEFAULT_TEXT = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def test_the_default_prompt() -> None:
    """For templates without tools, such as the demo's."""
    template = ChatTemplate(SMOLLM)
    shown, tools = plan(template, [TIME]).prompt([USER])
    assert tools is None
    assert shown == [{"role": "system", "content": DEFAULT_TEXT}, USER]
    shown, _ = plan(template, [TIME]).prompt([{"role": "system", "content": "Be brief."}, USER])
    assert shown == [{"role": "system", "content": "Be brief.\n\n" + DEFAULT_TEXT}, USER]


def test_the_default_is_what_qwens_template_writes() -> None:
    """A model that knows the format sees the prompt that it was trained on."""
    own, default = ChatTemplate(TOOL_TEMPLATES["qwen"]), ChatTemplate(CHATML)
    for messages in (CONVERSATIONS["system"], [CONVERSATIONS["system"][0], *CONVERSATIONS["call"]]):
        shown, tools = plan(own, TOOLS).prompt(messages)
        other, _ = plan(default, TOOLS).prompt(messages)
        assert own.render(shown, tools=tools) == default.render(other)


def test_calls_of_the_history_in_the_default() -> None:
    """Roles alternate: templates for two speakers take it."""
    template = named_template("guanaco")
    messages = [
        USER,
        {"role": "assistant", "content": "Both.", "tool_calls": [call(1, city="A"), call(2, city="é")]},
        answer(1, "21"),
        answer(2, "22"),
        {"role": "user", "content": "So?"},
    ]
    for tools in (TOOLS, None):
        shown, _ = plan(template, tools).prompt(messages)
        assert shown[-2:] == [
            {
                "role": "assistant",
                "content": 'Both.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "A"}}\n</tool_call>\n'
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "é"}}\n</tool_call>',
            },
            {
                "role": "user",
                "content": "<tool_response>\n21\n</tool_response>\n<tool_response>\n22\n</tool_response>\nSo?",
            },
        ]
        assert template.render(shown)


def test_a_template_without_system_messages_gets_the_tools_in_the_first_question() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}{% endfor %}"
    )
    shown, _ = plan(template, [TIME]).prompt([USER])
    assert shown == [{"role": "user", "content": DEFAULT_TEXT + "\n\n" + USER["content"]}]
    assert template.render(shown)


def test_tools_that_must_not_be_called_are_not_told() -> None:
    template = ChatTemplate(TOOL_TEMPLATES["qwen"])
    none = plan(template, TOOLS, "none")
    assert none.prompt([USER]) == ([USER], None)
    assert none.reader() is None
    assert plan(template, None).prompt([USER]) == ([USER], None)


def test_allowed_tools_are_all_told_and_some_may_be_called() -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    made = plan(ChatTemplate(SMOLLM), TOOLS, {"type": "allowed_tools", "allowed_tools": allowed})
    assert made.names == ("get_time",)
    assert len(made.shown) == 2


def test_what_a_template_is_shown_of_a_tool() -> None:
    """As it was given, in its order, without what speaks to the server; no parameters means an empty list of them."""
    given = {
        "type": "function", "cache_control": {},
        "function": {"strict": True, "parameters": None, "description": None, "name": "f", "x": 1},
    }  # fmt: skip
    (tool,) = parse_tools([given])
    assert tool.strict
    assert tool.shown == {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
    }
    (tool,) = parse_tools([{"type": "function", "function": {"parameters": {"type": "object"}, "name": "f"}}])
    assert list(tool.shown["function"]) == ["parameters", "name"]


def test_choices() -> None:
    assert parse_tool_choice("required") == ToolChoice("required")
    named = {"type": "function", "function": {"name": "f"}}
    assert parse_tool_choice(named) == parse_tool_choice({"type": "function", "name": "f"})
    for tools, choice, words in ((TOOLS, named, "not in tools"), (None, "required", "no tools")):
        with pytest.raises(ApiError) as error:
            plan(ChatTemplate(SMOLLM), tools, choice)
        assert words in error.value.message
        assert error.value.param == "tool_choice"
    assert plan(ChatTemplate(SMOLLM), None, "auto").reader() is None


def test_answers_find_their_calls() -> None:
    template = ChatTemplate(SMOLLM)
    asked = {"role": "assistant", "content": "", "tool_calls": [call(1)]}

    def refused(*messages: Message) -> str:
        with pytest.raises(ApiError) as error:
            plan(template, TOOLS).prompt(list(messages))
        return error.value.param or ""

    assert refused(USER, answer(1, "x")) == "messages[1].tool_call_id"
    assert refused(USER, asked, answer(2, "x")) == "messages[2].tool_call_id"
    assert refused(USER, asked, answer(1, "x"), answer(1, "x")) == "messages[3].tool_call_id"
    assert refused(USER, asked, {"role": "tool", "content": "x"}, {"role": "tool", "content": "x"}) == "messages[3]"
    assert plan(template).prompt([USER, asked, USER]), "a call may stay unanswered"
    assert plan(template).prompt([USER, asked, {"role": "tool", "content": "x"}])
    assert plan(template).prompt([USER, asked, answer(1, "x"), asked, answer(1, "y")]), "ids may come again"


def test_the_arguments_of_a_history_are_bounded_before_they_are_parsed() -> None:
    def calls(count: int) -> list[Any]:
        arguments = '{"a": [' + "0," * count + "0]}"
        return [{"id": "1", "function": {"name": "f", "arguments": arguments}}]

    assert len(parse_calls(calls(MAX_ARGUMENT_PARTS - 3))[0].arguments["a"]) == MAX_ARGUMENT_PARTS - 2
    with pytest.raises(PydanticCustomError, match="at most 65536 commas"):
        parse_calls(calls(MAX_ARGUMENT_PARTS - 2))
