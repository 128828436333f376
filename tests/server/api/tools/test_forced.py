"""Answers that have to be calls: drawn at random from their grammars, they are always read as calls that fit."""

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guanaco.models.text.chat_template import ChatTemplate
from guanaco.server.api.http.errors import ApiError
from guanaco.server.api.tools.calls import ChoiceCalls
from guanaco.server.api.tools.definitions import parse_tool_choice, parse_tools
from guanaco.server.api.tools.forced import MAX_CALLS, closed
from guanaco.server.api.tools.plan import ToolPlan, plan_tools
from guanaco.server.grammars.compiler import GrammarCompiler
from guanaco.server.grammars.errors import GrammarError
from guanaco.server.grammars.spec import Grammar, json_schema
from guanaco.server.grammars.vocabulary import Vocabulary
from support.models.tiny_tokenizers import SMOLLM
from support.models.tool_templates import TOOL_TEMPLATES
from support.server.fake_engine import EOS, VOCAB_SIZE, FakeTokenizer

TEMPLATES = {"default": SMOLLM, **TOOL_TEMPLATES}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "set_light",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "room": {"type": "string", "enum": ["kitchen", "cellar"]},
                    "level": {"type": "integer", "minimum": 0, "maximum": 100},
                },
                "required": ["room", "level"],
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
NAMED = {"type": "function", "function": {"name": "set_light"}}


NO_TOKENS: Mapping[str, int] = {}
CONTROLS = {"<tool_call>": 258, "</tool_call>": 259, "[TOOL_CALLS]": 258, "[ARGS]": 259, "<|python_tag|>": 258}


class Tokenizer(FakeTokenizer):
    """With control tokens of the test's own choice."""

    def __init__(self, **controls: int) -> None:
        super().__init__()
        self.controls = controls

    def control_id(self, text: str) -> int | None:
        return self.controls.get(text)


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    tokenizer = FakeTokenizer()
    made = GrammarCompiler(
        lambda: Vocabulary.of(tokenizer.token_bytes, VOCAB_SIZE, tokenizer.special_ids, set(CONTROLS.values()))
    )
    yield made
    made.close()


def plan(name: str, choice: Any, tools: Any = TOOLS, **options: Any) -> ToolPlan:
    parallel = options.pop("parallel", None)
    given = {"template": ChatTemplate(TEMPLATES[name]), "tokenizer": FakeTokenizer(), **options}
    return plan_tools(parse_tools(tools), parse_tool_choice(choice), parallel, **given)


def draw(
    compiler: GrammarCompiler,
    grammar: Grammar,
    seed: int,
    most: int = 3000,
    controls: Mapping[str, int] = NO_TOKENS,
) -> str:
    """A text of the grammar, token by token; the end is taken as soon as it may be, three times out of four."""
    names = {token: name.encode() for name, token in controls.items()}
    matcher, rng = compiler.compile(grammar).matcher(frozenset({EOS})), random.Random(seed)
    tokens: list[int] = []
    row = np.zeros((VOCAB_SIZE + 31) // 32, dtype=np.int32)
    while not matcher.is_complete and len(tokens) < most:
        matcher.fill(row)
        assert matcher.error is None
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
        if EOS in allowed and (len(allowed) == 1 or rng.random() < 0.75):
            break
        token = rng.choice([token for token in allowed if token != EOS])
        tokens.append(token)
        matcher.accept(token)
    return b"".join(names.get(token) or bytes([token]) for token in tokens).decode(errors="replace")


def read(made: ToolPlan, text: str) -> ChoiceCalls:
    reader = made.reader()
    assert reader is not None
    calls = ChoiceCalls()
    for character in text:
        calls.take(reader.feed(character))
    calls.take(reader.finish())
    return calls


def read_whole(made: ToolPlan, text: str) -> tuple[str | None, list[str]]:
    """Content and names, read in one piece."""
    reader = made.reader()
    assert reader is not None
    calls = ChoiceCalls()
    calls.take([*reader.feed(text), *reader.finish()])
    return calls.content, [call.name for call in calls.calls]


def check(calls: ChoiceCalls) -> None:
    assert calls.content is None
    for call in calls.tool_calls:
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "get_time":
            assert arguments == {}
        else:
            assert set(arguments) == {"room", "level"}
            assert arguments["room"] in ("kitchen", "cellar")
            assert 0 <= arguments["level"] <= 100


@pytest.mark.parametrize("name", TEMPLATES)
def test_required_calls_always_parse(compiler: GrammarCompiler, name: str) -> None:
    made = plan(name, "required")
    grammar = made.grammar(None)
    counts = []
    for seed in range(12):
        calls = read(made, draw(compiler, grammar, seed))
        check(calls)
        counts.append(len(calls.calls))
    assert min(counts) >= 1
    assert max(counts) <= MAX_CALLS
    assert (max(counts) > 1) == (name != "llama3.1"), "its format has one call"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_function_is_called_once(compiler: GrammarCompiler, name: str) -> None:
    made = plan(name, NAMED)
    for seed in range(4):
        calls = read(made, draw(compiler, made.grammar(None), seed))
        check(calls)
        assert [call.name for call in calls.calls] == ["set_light"]


def test_one_call_where_more_are_not_wanted(compiler: GrammarCompiler) -> None:
    made = plan("default", "required", parallel=False)
    assert {len(read(made, draw(compiler, made.grammar(None), s)).calls) for s in range(6)} == {1}


def test_allowed_tools_that_are_required(compiler: GrammarCompiler) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    made = plan("default", {"type": "allowed_tools", "allowed_tools": allowed})
    calls = read(made, draw(compiler, made.grammar(None), 1))
    assert {call.name for call in calls.calls} == {"get_time"}


def test_forced_calls_are_read_whatever_the_setting(compiler: GrammarCompiler) -> None:
    made = plan("mistral", NAMED, setting="none")
    check(read(made, draw(compiler, made.grammar(None), 0)))


def test_a_marker_that_is_a_control_token_stands_at_the_end_of_the_prompt(compiler: GrammarCompiler) -> None:
    tokenizer = Tokenizer(**{"[TOOL_CALLS]": 260, "<tool_call>": 259})
    for name, token in (("mistral", 260), ("qwen", 259), ("llama3.1", None)):
        made = plan(name, "required", tokenizer=tokenizer)
        assert made.begun == token
        text = draw(compiler, made.grammar(None), 3, controls=tokenizer.controls)
        assert not text.startswith(("[TOOL_CALLS]", "<tool_call>"))
        calls = read(made, text)
        check(calls)
        assert calls.calls
        assert plan(name, "auto", tokenizer=tokenizer).begun is None


def test_calls_or_content_of_a_response_format(compiler: GrammarCompiler) -> None:
    """A client that gives both wants its tools called, and in the end its JSON."""
    schema = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}
    content = Grammar("json_schema", json_schema(schema).text, "response_format")
    made = plan("default", "auto")
    seen = set()
    for seed in range(12):
        calls = read(made, draw(compiler, made.grammar(content), seed))
        if calls.calls:
            check(calls)
        else:
            assert json.loads(calls.content) == {"x": 1}
        seen.add(bool(calls.calls))
    assert seen == {True, False}
    assert plan("default", "none").grammar(content) == content
    assert plan("default", "auto", tools=None).grammar(content) == content
    forced = plan("default", NAMED)
    assert forced.grammar(content) == forced.grammar(None)


def test_two_demands_are_refused() -> None:
    regex = Grammar("regex", "a+", "guided_regex")
    with pytest.raises(ApiError) as error:
        plan("default", "required").grammar(regex)
    assert (error.value.param, error.value.status) == ("guided_regex", 400)
    assert plan("default", "auto").grammar(regex) == regex


def test_a_schema_that_cannot_be_enforced_is_named() -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(ApiError) as error:
        plan("default", "required", tools=[TOOLS[0], bad]).grammar(None)
    assert error.value.param == "tools[1].function.parameters"
    assert "not" in error.value.message
    assert plan("default", "auto", tools=[bad]).grammar(None) is None, "the model is only told of it"
    assert plan("default", NAMED, tools=[TOOLS[0], bad]).grammar(None), "it isn't called"


def test_arguments_that_no_parameter_has() -> None:
    assert closed({"properties": {"a": {}}}) == {
        "type": "object", "properties": {"a": {}}, "additionalProperties": False,
    }  # fmt: skip
    for said in ({"additionalProperties": True}, {"$ref": "#/$defs/A"}, {"anyOf": [{}]}, {"patternProperties": {}}):
        assert closed(said) == {**said, "type": "object"}


def test_arguments_stream_as_they_are_written(compiler: GrammarCompiler) -> None:
    made = plan("default", NAMED)
    text = draw(compiler, made.grammar(None), 1)
    reader = made.reader()
    events = [event for character in text for event in reader.feed(character)]
    assert len(events) > 10


def spelled(text: str, controls: Mapping[str, int]) -> list[int]:
    """The text's tokens, with these control tokens where they are written."""
    names = "|".join(map(re.escape, controls)) or "$."
    parts = re.split(f"({names})", text)
    return [token for part in parts for token in ([controls[part]] if part in controls else part.encode())]


def allowed_after(
    compiler: GrammarCompiler,
    grammar: Grammar,
    text: str,
    controls: Mapping[str, int] = NO_TOKENS,
    *,
    as_text: bool = False,
    seed: int | None = None,
) -> tuple[set[str], str]:
    """What may follow a text, "" for its end; the text itself must be allowed. as_text: no control
    tokens in it. seed: go on at random, to the end."""
    matcher = compiler.compile(grammar).matcher(frozenset({EOS}))
    names = {token: name for name, token in controls.items()}
    row = np.zeros((VOCAB_SIZE + 31) // 32, dtype=np.int32)
    todo, done, rng = spelled(text, NO_TOKENS if as_text else controls), b"", random.Random(seed)
    while True:
        matcher.fill(row)
        assert matcher.error is None
        tokens = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
        if todo:
            token = todo.pop(0)
            assert token in tokens, f"{names.get(token, token)} not after {done!r}"
        elif seed is None or tokens == [EOS] or (EOS in tokens and rng.random() < 0.5):
            return {"" if t == EOS else names.get(t) or chr(t) for t in tokens}, done.decode(errors="replace")
        else:
            token = rng.choice([token for token in tokens if token != EOS])
        done += names[token].encode() if token in names else bytes([token])
        matcher.accept(token)
        if matcher.is_complete:
            return {""}, done.decode(errors="replace")


def following(
    compiler: GrammarCompiler, grammar: Grammar | None, text: str, controls: Mapping[str, int] = NO_TOKENS
) -> set[str]:
    assert grammar is not None
    return allowed_after(compiler, grammar, text, controls)[0]


def test_strict_tools_in_a_free_text(compiler: GrammarCompiler) -> None:
    """Any text may come; where a call begins, it has to become one."""
    grammar = plan("default", "auto").grammar(None)
    assert len(following(compiler, grammar, "I see, <tool_cal <b>")) > 100
    assert "" in following(compiler, grammar, "")
    assert following(compiler, grammar, "Well. <tool_call>") == {"\n"}
    call = '<tool_call>\n{"name": "set_light", "arguments": {"room": "cellar", "level": 7}}\n</tool_call>'
    assert following(compiler, grammar, call[: call.index("ellar")]) == {"e"}
    assert len(following(compiler, grammar, call)) > 100
    assert following(compiler, grammar, call + " and " + call + "\n<tool_call>") == {"\n"}
    one = plan("default", "auto", parallel=False).grammar(None)
    assert len(following(compiler, one, call + "<tool_call>")) > 100, "the second one is content"


def test_strict_tools_in_llama_3s_format(compiler: GrammarCompiler) -> None:
    """There a call begins where the answer does, or behind another call."""
    grammar = plan("llama3.1", "auto").grammar(None)
    call = '{"name": "set_light", "parameters": {"room": "cellar", "level": 7}}'
    for before in ("", " \n", " ;\n", "<|python_tag|>", "Well <|python_tag|>", "; ;<|python_tag|>", call + "; "):
        assert following(compiler, grammar, before + '{"name": "') == {"s", "g"}, before
        assert following(compiler, grammar, before + call[: call.index("ellar")]) == {"e"}, before
    for before in ("Say ", "; ; ", ";;", call + " or ", call + ", "):
        assert len(following(compiler, grammar, before + "{x")) > 100, "no call begins here"
    assert following(compiler, grammar, "Well <|python_tag|>") == {"{"}
    assert {"", "a", "{", ";"} <= following(compiler, grammar, "")
    assert "" in following(compiler, grammar, call + " ; ")
    one = plan("llama3.1", "auto", parallel=False).grammar(None)
    assert len(following(compiler, one, call + "{x")) > 100, "the second one is content"


def test_strict_tools_in_mistrals_format(compiler: GrammarCompiler) -> None:
    grammar = plan("mistral", "auto").grammar(None)
    call = '{"name": "set_light", "arguments": {"room": "cellar", "level": 7}}'
    assert following(compiler, grammar, "Well. [TOOL_CALLS]") == {" ", "[", "s", "g"}
    for begun in ("[TOOL_CALLS][", "[TOOL_CALLS] [", f"ok [TOOL_CALLS][{call}, "):
        assert following(compiler, grammar, begun + call[: call.index("ellar")]) == {"e"}
    assert following(compiler, grammar, '[TOOL_CALLS]set_light[ARGS]{"room": "c') == {"e"}
    assert len(following(compiler, grammar, f"[TOOL_CALLS][{call}] [TOOL_CAL")) > 100
    assert len(following(compiler, grammar, f"[TOOL_CALLS][{call}]")) > 100
    one = plan("mistral", "auto", parallel=False).grammar(None)
    assert following(compiler, one, f"[TOOL_CALLS][{call}") == {"]"}


LURES = {
    "default": ("<tool_call>", "Hm <tool_call>", '<tool_call>\n{"name": "set'),
    "qwen": ("<tool_call>", "Hm <tool_call>"),
    "mistral": ("[TOOL_CALLS]", "Hm [TOOL_CALLS] [", "[TOOL_CALLS]get_time[ARGS]", '[TOOL_CALLS][{"name": "g'),
    "llama3.1": ("{", " ;\n{", "Hm <|python_tag|>", "<|python_tag|>", '{"name": "set_light"'),
}


@pytest.mark.parametrize("with_tokens", [False, True], ids=["text", "control tokens"])
@pytest.mark.parametrize("name", LURES)
def test_strict_calls_in_a_free_text_always_parse(compiler: GrammarCompiler, name: str, with_tokens: bool) -> None:
    """What begins as a call, in the format's text or with its control token, is read as calls that fit."""
    own = plan(name, "auto").call_format.control_texts
    controls = {text: CONTROLS[text] for text in own if text in CONTROLS} if with_tokens else {}
    made = plan(name, "auto", tokenizer=Tokenizer(**controls))
    grammar = made.grammar(None)
    assert grammar is not None
    made = replace(made, is_sure=True)
    for number, lure in enumerate(LURES[name]):
        for as_text in {True, not controls}:  # a model may spell what it has a token for
            for seed in range(3):
                _, text = allowed_after(compiler, grammar, lure, controls, as_text=as_text, seed=seed + 10 * number)
                calls = read(made, text)
                assert calls.calls, text
                check(replace(calls, contents=[]))
                assert (calls.content or "").startswith("Hm") == lure.startswith("Hm")
                assert read_whole(made, text) == (calls.content, [call.name for call in calls.calls])


def test_a_control_token_that_begins_calls_is_asked_for(compiler: GrammarCompiler) -> None:
    for name in ("qwen", "mistral", "llama3.1"):
        own = plan(name, "auto").call_format.control_texts
        controls = {text: CONTROLS[text] for text in own if text in CONTROLS}
        made = plan(name, "auto", tokenizer=Tokenizer(**controls))
        mark = made.call_format.markers[0]
        assert mark in following(compiler, made.grammar(None), "", controls), name
        assert mark in following(compiler, made.grammar(None), "Hm. ", controls), name
        assert len(following(compiler, made.grammar(None), mark, controls)) < 5, name
        free = plan(name, "auto", tokenizer=Tokenizer(**controls), tools=TOOLS[1:])
        assert free.grammar(None) is None, "nothing is strict"
    closed_by = following(
        compiler,
        plan("qwen", "auto", tokenizer=Tokenizer(**{"</tool_call>": 259})).grammar(None),
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n',
        {"</tool_call>": 259},
    )
    assert closed_by == {"</tool_call>"}


def test_no_other_grammar_gets_the_control_tokens_of_calls(compiler: GrammarCompiler) -> None:
    for text in ("start: <[258]>\n", "start: <[*]>\n", "start: (<[258]> | /(.|\\n)*/)\n"):
        try:
            matcher = compiler.compile(Grammar("grammar", text)).matcher(frozenset({EOS}))
        except GrammarError:
            continue
        row = np.zeros((VOCAB_SIZE + 31) // 32, dtype=np.int32)
        matcher.fill(row)
        tokens = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
        assert tokens, text
        assert not {258, 259} & set(tokens), text


def test_where_nothing_is_enforced_with_auto() -> None:
    assert plan("default", "auto", tools=TOOLS[1:]).grammar(None) is None, "no tool is strict"
    assert plan("default", "auto", setting="none").grammar(None) is None, "answers are not searched"
    assert plan("default", "auto").grammar(regex := Grammar("regex", "a+", "guided_regex")) == regex
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    assert plan("default", "auto", tools=[TOOLS[0], bad]).grammar(None), "it is not strict: any object will do"
    with pytest.raises(ApiError):
        plan("default", "auto", tools=[{**bad, "function": {**bad["function"], "strict": True}}]).grammar(None)
