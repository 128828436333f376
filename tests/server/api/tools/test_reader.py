"""Calls found in what models write: each format, whole and cut at every place, and text that only looks like calls."""

import json
import random
from collections.abc import Iterable

import pytest

from guanaco.server.api.tools.formats.base import CallFormat
from guanaco.server.api.tools.formats.hermes import HERMES
from guanaco.server.api.tools.formats.llama3 import LLAMA3
from guanaco.server.api.tools.formats.mistral import MISTRAL
from guanaco.server.api.tools.reader import CallArguments, CallBegins, Content, Event, ToolCallReader

NAMES = ("get_weather", "get_time", "f")
W = '{"city": "Zürich \\"x\\" <tool_call>", "n": [1, -2.5e3, true, null, {"a": {}}]}'
Result = tuple[str, list[tuple[str, str]]]


def collect(events: Iterable[Event]) -> Result:
    content, calls = "", []
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallBegins):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        else:
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, calls


def read(
    call_format: CallFormat,
    pieces: Iterable[str],
    *,
    sure: bool = False,
    forced: bool = False,
    names: tuple[str, ...] = NAMES,
) -> Result:
    reader = ToolCallReader(call_format, names, sure=sure, forced=forced)
    events: list[Event] = []
    for piece in pieces:
        events += reader.feed(piece)
    return collect(events + reader.finish())


# (format, text, content, calls)
CASES: dict[str, tuple[CallFormat, str, str, list[tuple[str, str]]]] = {
    "one": (
        HERMES, f'<tool_call>\n{{"name": "get_weather", "arguments": {W}}}\n</tool_call>', "", [("get_weather", W)],
    ),
    "text before": (
        HERMES, 'I look.\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n', "I look.", [("f", "{}")],
    ),
    "several": (
        HERMES,
        '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>\n<tool_call>\n{"arguments": {"b": 2}, "name": "f"}\n'
        "</tool_call>",
        "",
        [("f", '{"a":1}'), ("f", '{"b": 2}')],
    ),
    "text between and behind": (
        HERMES,
        'a <tool_call>{"name":"f","arguments":{}}</tool_call> b\n<tool_call>{"name":"f"}</tool_call>\n c ',
        "a b\n c ",
        [("f", "{}"), ("f", "{}")],
    ),
    "list": (
        HERMES,
        '<tool_call>[{"name": "f", "arguments": {"x": 1}}, {"name": "get_time"}]</tool_call>',
        "",
        [("f", '{"x": 1}'), ("get_time", "{}")],
    ),
    "no closing tag": (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n', "", [("f", "{}")]),
    "no closing tag between": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "f", "arguments": {"a": 2}}</tool_call>',
        "",
        [("f", "{}"), ("f", '{"a": 2}')],
    ),
    "no closing tag, then no call": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>oops',
        "<tool_call>oops",
        [("f", "{}")],
    ),
    "arguments as text": (
        HERMES, '<tool_call>{"name":"f","arguments":"{\\"a\\": \\"\\u00e9\\"}"}</tool_call>', "", [("f", '{"a": "é"}')],
    ),
    "parameters": (HERMES, '<tool_call>{"name":"f","parameters":{"a":1}}</tool_call>', "", [("f", '{"a":1}')]),
    "null arguments": (HERMES, '<tool_call>{"name":"f","arguments":null}</tool_call>', "", [("f", "{}")]),
    "id and type": (
        HERMES, '<tool_call>{"id":"1","type":"function","name":"f","arguments":{}}</tool_call>', "", [("f", "{}")],
    ),
    "unknown function": (
        HERMES,
        '<tool_call>{"name":"rm_rf","arguments":{}}</tool_call>',
        '<tool_call>{"name":"rm_rf","arguments":{}}</tool_call>',
        [],
    ),
    "broken, then good": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {x}}</tool_call> <tool_call>{"name":"f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {x}}</tool_call>',
        [("f", "{}")],
    ),
    "marker twice": (HERMES, '<tool_call><tool_call>{"name":"f"}</tool_call>', "<tool_call>", [("f", "{}")]),
    "cut off": (
        HERMES, 'x <tool_call>{"name": "f", "argum', 'x <tool_call>{"name": "f", "argum', [],
    ),
    "garbage behind the object": (
        HERMES, '<tool_call>{"name":"f"} yes</tool_call>', '<tool_call>{"name":"f"} yes</tool_call>', [],
    ),
    "half a marker": (HERMES, "if a <tool_c", "if a <tool_c", []),
    "only text": (HERMES, " \n2 < 3 <b>x</b> {}\n\n ", " \n2 < 3 <b>x</b> {}\n\n ", []),
    "empty": (HERMES, "", "", []),
    "llama3": (LLAMA3, f'{{"name": "get_weather", "parameters": {W}}}', "", [("get_weather", W)]),
    "llama3 with tag": (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "llama3 with text and tag": (LLAMA3, 'Well: <|python_tag|>{"name": "f"}', "Well:", [("f", "{}")]),
    "llama3 type first": (LLAMA3, '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    "llama3 several": (
        LLAMA3,
        '\n\n{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 2}}\n'
        '{"name": "get_time", "parameters": {}} ',
        "",
        [("f", '{"a": 1}'), ("f", '{"a": 2}'), ("get_time", "{}")],
    ),
    "llama3 JSON that is no call": (LLAMA3, ' {"name": "Bob", "age": 3}', ' {"name": "Bob", "age": 3}', []),
    "llama3 JSON in a text": (
        LLAMA3, 'Use {"name": "f", "parameters": {}}', 'Use {"name": "f", "parameters": {}}', [],
    ),
    "llama3 code": (LLAMA3, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    "llama3 text behind": (LLAMA3, '{"name": "f"}; and so on', "; and so on", [("f", "{}")]),
    "mistral": (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {W}}}, {{"name": "f", "arguments": {{}}}}]\n',
        "",
        [("get_weather", W), ("f", "{}")],
    ),
    "mistral text before": (MISTRAL, 'ok [TOOL_CALLS][{"name": "f"}]', "ok", [("f", "{}")]),
    "mistral unfinished list": (MISTRAL, '[TOOL_CALLS][{"name": "f"}, {"na', ', {"na', [("f", "{}")]),
    "mistral newer": (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": {"b": "}"}}', "", [("f", '{"a": {"b": "}"}}')]),
    "mistral newer with id": (
        MISTRAL,
        '[TOOL_CALLS]f[CALL_ID]Ab9[ARGS]{"a": 1}[TOOL_CALLS]get_time{}',
        "",
        [("f", '{"a": 1}'), ("get_time", "{}")],
    ),
    "mistral no call": (MISTRAL, "[TOOL_CALLS] none [TOOL", "[TOOL_CALLS] none [TOOL", []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_whole_by_characters_and_cut_at_every_place(case: str) -> None:
    call_format, text, content, calls = CASES[case]
    expected = (content, calls)
    assert read(call_format, [text]) == expected
    assert read(call_format, text) == expected
    for cut in range(len(text) + 1):
        assert read(call_format, [text[:cut], "", text[cut:]]) == expected, f"cut at {cut}"
    for name, arguments in calls:
        assert name in NAMES
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("call_format", [HERMES, LLAMA3, MISTRAL], ids=lambda f: f.name)
def test_random_texts_read_the_same_however_they_are_cut(call_format: CallFormat) -> None:
    """Texts made of pieces of calls: most are broken in some way, and none loses a character that isn't white space."""
    pieces = [
        *("<tool_call>", "</tool_call>", "<tool_", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "{", "}", "[", "]", ","),
        *('"name"', '"arguments"', '"parameters"', ":", '"f"', '"get_time"', '"x"', "f", "1", "-", "true", "nul"),
        *(" ", "\n", ";", "é", "\\", '"', "text", "{}", '{"name": "f", "arguments": {}}', '{"name": "f"}'),
        *('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', '[TOOL_CALLS][{"name": "f"}]'),
        *('{"name": "get_time", "parameters": {"a": "', '"}}', '<tool_call>\n{"name": "f", "arguments": {"q": '),
    ]
    rng = random.Random(7)
    num_calls = 0
    for _ in range(1500):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        whole = read(call_format, [text])
        num_calls += len(whole[1])
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(call_format, parts) == whole, parts
        assert read(call_format, text) == whole, text
        if not whole[1]:
            assert whole[0] == text, "what is no call is content, whole"
    assert num_calls > 30, "the texts have calls"


def test_text_is_held_no_longer_than_it_may_begin_a_call() -> None:
    def given(call_format: CallFormat, *pieces: str) -> list[str]:
        reader = ToolCallReader(call_format, NAMES)
        return [collect(reader.feed(piece))[0] for piece in pieces]

    assert given(HERMES, "Hello", ", you", " <", "b>") == ["Hello", ", you", "", " <b>"]
    assert given(HERMES, "<tool_call>", "{", '"n', "o") == ["", "", "", '<tool_call>{"no']
    assert given(HERMES, "<tool_call>", '{"name": "get_', "x") == ["", "", '<tool_call>{"name": "get_x']
    assert given(HERMES, "<tool_call>", '{"name": "f", "arguments": {"a": 0', "1") == [
        "", "", '<tool_call>{"name": "f", "arguments": {"a": 01',
    ]  # fmt: skip
    assert given(LLAMA3, "{", '"answer', '": 1}', " {") == ["", '{"answer', '": 1}', " {"]


def test_a_call_comes_at_once_when_it_is_complete() -> None:
    reader = ToolCallReader(HERMES, NAMES)
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert reader.feed(text[:-1]) == []
    assert reader.feed(text[-1]) == [CallBegins(0, "f"), CallArguments(0, '{"a": 1}')]
    assert reader.num_calls == 1


@pytest.mark.parametrize(
    ("call_format", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'),
        (LLAMA3, '{"name": "f", "parameters": {"a": "b"}}'),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": "b"}}]'),
    ],
    ids=["hermes", "llama3", "mistral"],
)
def test_where_calls_are_sure_arguments_come_as_they_are_written(call_format: CallFormat, text: str) -> None:
    reader = ToolCallReader(call_format, NAMES, sure=True)
    events = [event for char in text for event in reader.feed(char)]
    assert events[0] == CallBegins(0, "f")
    assert [event.text for event in events[1:]] == list('{"a": "b"}')
    for cut in range(len(text) + 1):
        assert read(call_format, [text[:cut], text[cut:]], sure=True) == ("", [("f", '{"a": "b"}')])
        content, calls = read(call_format, text[:cut], sure=True)
        assert not (content and calls), "a call that was begun is no content as well"
        assert all('{"a": "b"}'.startswith(arguments) for _, arguments in calls)


FORCED = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'),
    (LLAMA3, '{"name": "f", "parameters": {"a": "b"}}'),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "b"}}]'),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": "b"}'),
]


@pytest.mark.parametrize(("call_format", "text"), FORCED)
def test_a_forced_call_that_is_cut_off_leaves_no_content(call_format: CallFormat, text: str) -> None:
    """What a format writes around a call is nothing that a client can read: it gets the name, and what came behind.
    A further call without arguments is left out: clients would run its function with an empty object."""
    named = text.index("f[" if "[ARGS]" in text else '"f"') + (2 if "[ARGS]" in text else 3)
    for cut in range(len(text)):
        for pieces in ([text[:cut]], list(text[:cut])):
            content, calls = read(call_format, pieces, forced=True)
            assert content == ""
            assert [name for name, _ in calls] == (["f"] if cut >= named else []), text[:cut]
            assert read(call_format, pieces, forced=True, names=("f",)) == ("", calls or [("f", "")])
    separator = {HERMES: "\n", LLAMA3: "; "}.get(call_format)
    for cut in range(len(text)) if separator is not None else ():
        content, calls = read(call_format, [text + separator + text[:cut]], forced=True)
        assert content == ""
        assert all(arguments for _, arguments in calls), text[:cut]
        assert calls[0] == ("f", '{"a": "b"}')
        assert len(calls) == 1 + (cut > text.index('{"a"')), text[:cut]


@pytest.mark.parametrize(("call_format", "text"), FORCED)
def test_a_sure_call_that_is_cut_off_keeps_the_text_before_it(call_format: CallFormat, text: str) -> None:
    marked = len(call_format.markers[0]) if call_format is not LLAMA3 else 1
    for cut in range(marked, len(text)):
        before = "" if call_format is LLAMA3 else "Well. "
        content, calls = read(call_format, [before + text[:cut]], sure=True)
        assert (content, len(calls) <= 1) == (before.strip(), True), text[:cut]
    assert read(call_format, ["2 < 3 <tool_"], sure=True) == ("2 < 3 <tool_", []), "no call has begun"


@pytest.mark.parametrize("depth", [100, 5000])
def test_deep_arguments_are_no_trouble(depth: int) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * depth + "]" * depth + "}}</tool_call>"
    content, calls = read(HERMES, [text])
    assert (content, len(calls)) == (("", 1) if depth == 100 else (text, 0))
