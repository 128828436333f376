"""1,000 random schemas, and a text of each that is drawn from the masks alone: all parse, and all are valid."""

import json
import re
from datetime import date, time, timedelta
from random import Random
from typing import Annotated, Any, Literal, Optional

import jsonschema
import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, Field, SecretStr, StringConstraints

from guanaco.server.grammars.building import build, lark_of
from guanaco.server.grammars.matcher import GrammarMatcher
from guanaco.server.grammars.spec import json_schema
from support.grammars.drawing import END, draw_text, small_vocabulary
from support.grammars.random_schemas import RandomSchemas


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=1, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Node(BaseModel):
    """Refers to itself, which pydantic writes as a $ref with a default beside it."""

    value: Annotated[int, Field(ge=0, le=99, description="a number")]
    next: Optional["Node"] = None


class Everything(BaseModel):
    name: Annotated[str, StringConstraints(pattern="^[a-z]{2}$")]
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    day: date
    clock: time | None
    takes: timedelta
    secret: Annotated[SecretStr, Field(max_length=3)]
    share: Annotated[float, Field(gt=0, lt=1)]
    pair: tuple[bool, Literal[1, 2]]
    some: Annotated[list[Node], Field(min_length=1, max_length=2)]


VOCABULARY = small_vocabulary()
PER_TEST, TESTS = 100, 10


def matcher_of(schema: Any) -> GrammarMatcher:
    grammar = json_schema(schema)
    return GrammarMatcher(build(lark_of(grammar), VOCABULARY, grammar.kind), VOCABULARY, {END})


@pytest.mark.parametrize("part", range(TESTS))
def test_every_text_that_ends_is_valid(part: int) -> None:
    schemas, random = RandomSchemas(part), Random(part)
    num_stopped = 0
    for number in range(PER_TEST):
        schema = schemas.schema()
        drawn = draw_text(matcher_of(schema), random)
        if not drawn.stopped:
            continue
        num_stopped += 1
        value = json.loads(drawn.text.decode())
        validator = jsonschema.Draft202012Validator(schema)
        assert validator.is_valid(value), (part, number, drawn.text, schema)
        outside = re.sub(rb'"(\\.|[^"\\])*"', b'""', drawn.text)
        assert not re.search(rb"[\n\r\t]|  | [,:}\]]|[\[{] ", outside), drawn.text
    assert num_stopped >= PER_TEST * 0.8


@pytest.mark.parametrize("model", [Everything, Node, Cat])
@pytest.mark.parametrize("is_strict", [False, True])
def test_schemas_as_pydantic_and_openais_client_write_them(model: type[BaseModel], is_strict: bool) -> None:
    schema = to_strict_json_schema(model) if is_strict else model.model_json_schema()
    num_stopped = 0
    for seed in range(20):
        drawn = draw_text(matcher_of(schema), Random(seed), most=600)
        if drawn.stopped:
            num_stopped += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(drawn.text))
    assert num_stopped >= 10


def test_a_schema_that_refers_to_its_root() -> None:
    schema = {
        "type": "object",
        "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}, "next": {"anyOf": [{"$ref": "#"}, {}]}},
        "required": ["kids"],
        "additionalProperties": False,
    }
    drawn = draw_text(matcher_of(schema), Random(1))
    assert drawn.stopped
    jsonschema.Draft202012Validator(schema).validate(json.loads(drawn.text))
