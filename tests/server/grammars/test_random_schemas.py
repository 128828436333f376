"""1,000 random schemas, and a text of each that is drawn from the masks alone: all parse, and all are valid."""

import json
import re
from random import Random
from typing import Any

import jsonschema
import pytest

from guanaco.server.grammars.building import build, lark_of
from guanaco.server.grammars.matcher import GrammarMatcher
from guanaco.server.grammars.spec import json_schema
from support.grammars.drawing import END, draw_text, small_vocabulary
from support.grammars.random_schemas import RandomSchemas

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
