"""From demands to grammars: equal ones are equal, each kind means what it says, and schemas are checked by name."""

import json
import re
from random import Random
from typing import Any

import pytest

from guanaco.server.grammars.building import build, lark_of, try_out
from guanaco.server.grammars.errors import GrammarError
from guanaco.server.grammars.matcher import GrammarMatcher
from guanaco.server.grammars.requested import FIELDS, requested
from guanaco.server.grammars.schemas import MAX_DEPTH, lark_json
from guanaco.server.grammars.spec import (
    Grammar,
    choice,
    grammar_of_parts,
    in_order,
    json_object,
    json_schema,
    literal,
    one_of,
    regex,
    repeated,
    schema,
    written,
)
from support.grammars.drawing import END, draw_text, small_vocabulary

VOCABULARY = small_vocabulary()
HARD = ('say "hi"', "back\\slash", "line\nbreak", "\x01\t", "é€😀", "/", "'", "</s>", "\u2028", "%json", "a|b", "<[1]>")


def closed_object(**properties: Any) -> dict[str, Any]:
    """The schema of an object with exactly these."""
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def texts(grammar: Grammar, count: int = 20) -> set[str]:
    """Some texts of a grammar, all whole."""
    prototype = build(lark_of(grammar), VOCABULARY, grammar.kind)
    try_out(prototype, VOCABULARY, grammar.kind)
    drawn = [draw_text(GrammarMatcher(prototype, VOCABULARY, {END}), Random(seed)) for seed in range(count)]
    assert all(one.stopped for one in drawn)
    return {one.text.decode() for one in drawn}


def test_equal_demands_are_equal_and_hashable() -> None:
    first, second = json_schema({"type": "integer"}), json_schema({"type": "integer", "title": "no matter"})
    assert first == second
    assert hash(first) == hash(second)
    assert first != json_schema({"type": "number"})
    by_field = requested({"guided_regex": "a"})
    assert by_field == regex("a")
    assert by_field is not None
    assert by_field.param == "guided_regex"


def test_choices_are_exact() -> None:
    assert texts(choice(HARD), 300) == set(HARD)


@pytest.mark.parametrize("text", HARD)
def test_a_literal_is_its_text(text: str) -> None:
    assert texts(grammar_of_parts(literal(text)), 3) == {text}


@pytest.mark.parametrize(
    "pattern",
    ["a/b[/]c", "[a-c]{2,4}", "(yes|no)", "^x$", "a\nb", '"q"', r"\d{3}-\d", "(?i)ab", "a?b?c", r"[^\s\S]?z"],
)
def test_a_regex_is_matched_as_a_whole(pattern: str) -> None:
    for text in texts(regex(pattern)):
        assert re.fullmatch(pattern, text), text


def test_lark_and_gbnf() -> None:
    assert texts(written('start: "a" B+\nB: /[xy]/'), 30) >= {"ax", "ay"}
    assert texts(written('root ::= "a" b\nb ::= [xy]'), 30) == {"ax", "ay"}


def test_parts_of_tool_calls() -> None:
    """Literal text around the arguments of one of two tools, once or several times."""

    def call(name: str, parameters: dict[str, Any]) -> Any:
        return in_order(
            literal(f'<tool_call>\n{{"name": "{name}", "arguments": '), schema(parameters), literal("}\n</>")
        )

    number = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    flag = {
        "type": "object",
        "properties": {"f": {"type": "boolean"}},
        "required": ["f"],
        "additionalProperties": False,
    }
    calls = repeated(one_of(call("number", number), call("flag", flag)), separator="\n", most=3)
    seen = set()
    for text in texts(grammar_of_parts(calls), 60):
        found = re.findall(r"<tool_call>\n(\{.*\})\n</>", text)
        assert text == "\n".join(f"<tool_call>\n{one}\n</>" for one in found)
        for one in map(json.loads, found):
            assert list(one["arguments"]) == [{"number": "n", "flag": "f"}[one["name"]]]
        seen.add(len(found))
    assert seen == {1, 2, 3}
    assert texts(grammar_of_parts(repeated(literal("x"), separator=",", most=1))) == {"x"}
    assert texts(grammar_of_parts(repeated(literal("x"), separator=",", least=2, most=2))) == {"x,x"}


def test_white_space_is_bounded() -> None:
    value = {
        "type": "array",
        "items": {"const": 1},
        "minItems": 2,
        "maxItems": 2,
        "x-guidance": {"whitespace_flexible": True},
    }
    assert texts(json_schema(value), 60) == {"[1,1]", "[1, 1]"}
    assert texts(json_schema(value, compact=True), 20) == {"[1,1]"}


def test_json_object_is_no_other_value() -> None:
    for text in texts(json_object(), 10):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 900])
def test_depth_is_bounded(depth: int) -> None:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        value = {"items": value}
    if depth == MAX_DEPTH:
        assert lark_json(value)
    else:
        with pytest.raises(GrammarError, match=f"more than {MAX_DEPTH} levels"):
            lark_json(value)


def test_annotations_and_their_names_as_properties() -> None:
    """What only describes is left out; a property may be called like a keyword."""
    value = {
        "type": "object",
        "title": "T",
        "default": {"not": 1},
        "examples": [{"if": 1}],
        "properties": {
            "not": {"const": 1},
            "if": {"const": 2},
            "format": {"type": "string", "format": "password", "maxLength": 1},
        },
        "required": ["not", "if", "format"],
        "additionalProperties": False,
    }
    for text in texts(json_schema(value), 5):
        assert json.loads(text).keys() == {"not", "if", "format"}


def test_a_union_that_pydantic_tells_apart() -> None:
    kinds = {
        name: {
            "type": "object",
            "properties": {"kind": {"const": name}},
            "required": ["kind"],
            "additionalProperties": False,
        }
        for name in ("cat", "dog")
    }
    union = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in kinds], "discriminator": {"propertyName": "kind"}}
    found = {json.loads(text)["kind"] for text in texts(json_schema({**union, "$defs": kinds}))}
    assert found == {"cat", "dog"}


@pytest.mark.parametrize("keyword", ["not", "if", "contains", "uniqueItems", "propertyNames", "dependentRequired"])
def test_a_keyword_that_cannot_be_enforced_is_named(keyword: str) -> None:
    for value in ({keyword: {}}, {"anyOf": [{"items": {keyword: True}}]}, {"$defs": {"x": {keyword: 1}}}):
        with pytest.raises(GrammarError, match=f"uses {keyword},"):
            json_schema(value)


def test_nothing_is_asked_for() -> None:
    assert requested({}) is None
    assert requested(dict.fromkeys(FIELDS)) is None
    assert requested({"response_format": {"type": "text"}, "guided_json": None}) is None
    both = {"response_format": {"type": "text"}, "guided_choice": ["a"]}
    assert requested(both) == choice(["a"])


_INTEGER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("value", "is_closed"),
    [
        (_INTEGER, True),
        ({"type": "object", "properties": {"o": _INTEGER}, "required": ["o"]}, True),
        ({"type": "array", "items": _INTEGER, "minItems": 1, "maxItems": 1}, True),
        ({"$ref": "#/$defs/o", "$defs": {"o": _INTEGER}}, True),
        ({"anyOf": [_INTEGER, {"type": "null"}]}, True),
        ({**_INTEGER, "additionalProperties": True}, False),
        ({**_INTEGER, "patternProperties": {"^x": {"type": "integer"}}}, False),
        ({"type": "object"}, False),
        ({**_INTEGER, "required": ["n", "other"]}, False),
        ({**_INTEGER, "minProperties": 2}, False),
        ({"allOf": [_INTEGER, {"type": "object", "properties": {"m": {}}, "required": ["m"]}]}, False),
        ({"oneOf": [_INTEGER, {"type": "string"}]}, False),
    ],
)
def test_objects_get_no_properties_that_nobody_named(value: dict[str, Any], is_closed: bool) -> None:
    """A small model would add properties without end. Where the schema needs or allows others, it may add them."""
    assert ('"additionalProperties": false' in lark_json(value)) == is_closed
    assert "additionalProperties" not in json.dumps(_INTEGER), "the client's schema is left as it is"


def test_a_property_may_be_called_as_a_keyword() -> None:
    value = {"type": "object", "properties": {"properties": {"const": 1}, "items": {"const": 2}}, "required": ["items"]}
    assert {text.replace(" ", "") for text in texts(json_schema(value))} == {
        '{"properties":1,"items":2}',
        '{"items":2}',
    }
