"""Structured output over the whole server and a tiny random model: what ends with `stop` keeps what was demanded."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import jsonschema
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from support.adapters.tiny_adapters import make_adapter
from support.grammars.random_schemas import RandomSchemas
from support.grammars.requests import CHAT, COMPLETIONS, PERSON, answer, chat, content, error_of, json_schema
from support.models.tiny_models import make_tiny_llama
from support.models.tiny_tokenizers import sentencepiece_pieces, write_sentencepiece_like
from support.server.api_server import sse_data
from support.server.real_server import ADMIN, BASE, RealServer, make_real_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with make_real_server(tmp_path_factory.mktemp("structured")) as live:
        yield live


@pytest.fixture
def client(server: RealServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
    server.assert_quiet()


@pytest.mark.parametrize("strict", [True, False, None])
def test_schema_holds_in_every_choice(client: httpx.Client, strict: bool | None) -> None:
    choices = answer(client, chat(n=4, response_format=json_schema(PERSON, strict=strict)))
    texts = [content(choice) for choice in choices]
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
        assert "\n" not in text
        assert "  " not in re.sub(r'"(\\.|[^"\\])*"', '""', text)
    assert len(set(texts)) == 4, "each choice has a matcher and a seed of its own"


def test_stream_holds_the_same_text(client: httpx.Client) -> None:
    body = chat(response_format=json_schema(PERSON))
    whole = content(answer(client, body)[0])
    events = sse_data(client.post(CHAT, json={**body, "stream": True}).content)
    chunks = [event["choices"][0] for event in events[:-1]]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole
    assert chunks[-1]["finish_reason"] == "stop"
    assert len(chunks) > 10, "text comes as it is made"


def test_last_token_is_shown_and_counted(client: httpx.Client) -> None:
    body = chat(structured_outputs={"choice": ["yes", "no"]}, logprobs=True)
    response = client.post(CHAT, json=body).json()
    choice = response["choices"][0]
    assert content(choice) in ("yes", "no")
    shown = "".join(entry["token"] for entry in choice["logprobs"]["content"])
    assert shown == content(choice)
    assert response["usage"]["completion_tokens"] == len(choice["logprobs"]["content"])


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{2}/[0-9]{3}"}}, r"[a-c]{2}/[0-9]{3}"),
        ({"guided_regex": "^(x|yz)$"}, r"x|yz"),
        ({"guided_choice": ['say "hi"', "ün\n"]}, 'say "hi"|ün\n'),
        ({"structured_outputs": {"grammar": 'start: "<" NUMBER ">"\nNUMBER: /[0-9]{2}/'}}, r"<[0-9]{2}>"),
        ({"guided_grammar": 'root ::= "<" [0-9] [0-9] ">"'}, r"<[0-9]{2}>"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_json": '{"enum": [1, "a", null]}'}, '1|"a"|null'),
        ({"structured_outputs": {"json": {"enum": [[1, 2]]}, "disable_any_whitespace": True}}, r"\[1,2\]"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_each_kind_is_kept(client: httpx.Client, fields: dict[str, Any], pattern: str, path: str) -> None:
    body = chat(n=2, **fields)
    if path == COMPLETIONS:
        body = {**{k: v for k, v in body.items() if k != "messages"}, "prompt": ["Hello", "Ahoy"]}
    for choice in answer(client, body, path):
        assert re.fullmatch(pattern, content(choice)), choice


def test_json_object_is_an_object(client: httpx.Client, server: RealServer) -> None:
    ids = {text: server.state.tokenizer.encode(text)[0] for text in '"}]'}
    bias = {str(ids['"']): 12, str(ids["}"]): 4, str(ids["]"]): 8}  # else a random model hardly ever ends
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        choices = answer(client, chat(n=8, logit_bias=bias, **fields))
        objects = [json.loads(content(c)) for c in choices if c["finish_reason"] == "stop"]
        assert all(isinstance(value, dict) for value in objects)
        assert any(objects), "not all of them are empty"


def test_what_is_cut_ends_with_length(client: httpx.Client) -> None:
    choice = answer(client, chat(max_tokens=5, response_format=json_schema(PERSON)))[0]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {"ignore_eos": True},
        {"min_tokens": 100},
        {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 0.1},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 1},
        {"temperature": 0},
        {"temperature": 2, "top_k": 3, "top_p": 0.5},
        {"logit_bias": {"2": 100, "0": 100, "1": 100, "60": -100}},
        {"logprobs": True, "top_logprobs": 5},
        {"skip_special_tokens": False},
        {"stop_token_ids": [1]},
    ],
)
def test_no_other_field_breaks_it(client: httpx.Client, fields: dict[str, Any]) -> None:
    text = content(answer(client, chat(response_format=json_schema(PERSON), **fields))[0])
    jsonschema.validate(json.loads(text), PERSON)
    assert "<|" not in text


def test_models_own_end_comes_only_when_the_text_is_whole(client: httpx.Client) -> None:
    """The end has every chance here, and the text can be whole after each letter."""
    choice = answer(client, chat(structured_outputs={"regex": "ab+"}, logit_bias={"2": 100}))[0]
    assert content(choice) == "ab"
    longer = answer(client, chat(structured_outputs={"regex": "ab+"}, logit_bias={"2": 100}, min_tokens=5))[0]
    assert re.fullmatch("ab+", content(longer))
    assert len(content(longer)) >= 4
    never = answer(client, chat(structured_outputs={"regex": "ab+"}, ignore_eos=True, max_tokens=9))[0]
    assert never["finish_reason"] == "length"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": "json"}, "response_format", "type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "name and schema"),
    ({"response_format": json_schema({}, name="a b")}, "response_format.json_schema.name", "letters"),
    ({"response_format": json_schema({}, name="x" * 65)}, "response_format.json_schema.name", "64"),
    ({"response_format": json_schema({}, strict="yes")}, "response_format.json_schema.strict", "true"),
    ({"response_format": json_schema([])}, "response_format.json_schema.schema", "object"),
    ({"response_format": json_schema({"not": {}})}, "response_format.json_schema.schema", "uses not"),
    ({"response_format": json_schema({"type": "array", "uniqueItems": True})}, "", "uniqueItems"),
    ({"response_format": json_schema({"$ref": "http://127.0.0.1/x"})}, "response_format", "$ref"),
    ({"response_format": json_schema({"$ref": "#/$defs/no"})}, "response_format", "$ref"),
    ({"response_format": json_schema({"type": "text"})}, "response_format", "valid"),
    ({"response_format": json_schema({"type": "string", "format": "iri"})}, "", "format may be date-time"),
    ({"response_format": json_schema({"pattern": "(?=a)b"})}, "response_format", "look-around"),
    ({"response_format": json_schema({"minLength": 3, "maxLength": 2, "type": "string"})}, "", "no value"),
    ({"response_format": json_schema({"oneOf": [{"type": "string"}, {"type": "string"}]})}, "", "anyOf"),
    ({"structured_outputs": {}}, "structured_outputs", "one of json"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "regex and choice"),
    ({"structured_outputs": {"json": {}, "whitespace_pattern": "x"}}, "structured_outputs.whitespace_pattern", "not"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"mine": 1}}, "structured_outputs", "not known"),
    ({"guided_regex": "("}, "guided_regex", "expression"),
    ({"guided_regex": r"(a)\1"}, "guided_regex", "backreferences"),
    ({"guided_regex": r"a\b"}, "guided_regex", "word boundaries"),
    ({"guided_regex": ""}, "guided_regex", "empty"),
    ({"guided_choice": []}, "guided_choice", "at least one"),
    ({"guided_choice": ["a", 1]}, "guided_choice", "list"),
    ({"guided_json": "{"}, "guided_json", "valid JSON"),
    ({"guided_grammar": "start: ("}, "guided_grammar", "line 1"),
    ({"guided_grammar": "start: <|im_end|>"}, "guided_grammar", "control token"),
    ({"guided_grammar": "start: <[2]>"}, "guided_grammar", "no text"),
    ({"guided_grammar": "%llguidance {}\nstart: /a/"}, "guided_grammar", "%llguidance"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "give one"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_wrong_demands_are_told_by_name(client: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    error = error_of(client, chat(**fields))
    assert error["code"] == "invalid_grammar"
    assert error["param"].startswith(param or "response_format")
    assert words in error["message"]


def test_text_asks_for_nothing(client: httpx.Client) -> None:
    plain = answer(client, chat(max_tokens=8))[0]["message"]
    assert answer(client, chat(max_tokens=8, response_format={"type": "text"}))[0]["message"] == plain
    assert answer(client, chat(max_tokens=8, response_format=None, guided_json=None))[0]["message"] == plain


def test_metrics_count_compilations_and_hits(client: httpx.Client, server: RealServer) -> None:
    def value(name: str) -> float:
        return server.state.metrics.registry.get_sample_value(name) or 0.0

    names = ("guanaco_grammar_compile_seconds_count", "guanaco_grammar_cache_hits_total")
    compiled, hits = map(value, names)
    for _ in range(3):
        content(answer(client, chat(guided_choice=["metrics"]))[0])
    assert (value(names[0]), value(names[1])) == (compiled + 1, hits + 2)


class Boss(BaseModel):
    id: Annotated[int | None, Field(ge=0, le=9)]


class Person(BaseModel):
    name: Annotated[str, Field(max_length=6)]
    old: bool
    boss: Boss | None


def test_official_client_parses_a_pydantic_model(client: httpx.Client, server: RealServer) -> None:
    with OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as openai:
        parsed = openai.chat.completions.parse(
            model=BASE, messages=[{"role": "user", "content": "Hi"}], max_tokens=300, seed=1, response_format=Person
        )
    assert isinstance(parsed.choices[0].message.parsed, Person)


def test_adapters_follow_grammars_too(tmp_path: Path) -> None:
    with make_real_server(tmp_path) as server, server.client() as client:
        make_adapter(server.root / "x", server.targets, rank=4, seed=1)
        loaded = client.put("/v1/adapters/x", json={"source": "x"}, headers=ADMIN)
        assert loaded.status_code in (200, 201), loaded.text
        fields = {"response_format": json_schema(PERSON), "n": 2}
        own = answer(client, chat(**fields, model="x"))
        mixed = answer(client, chat(**fields, adapters=[{"name": "x", "scale": 0.5}]))
        base = answer(client, chat(**fields))
        for choice in (*own, *mixed, *base):
            jsonschema.validate(json.loads(content(choice)), PERSON)
        assert own != base


def test_twenty_random_schemas_through_the_whole_server(client: httpx.Client) -> None:
    schemas, num_stopped = RandomSchemas(99), 0
    for seed in range(20):
        schema = schemas.schema()
        fields = {"response_format": json_schema(schema), "seed": seed, "stream": bool(seed % 2)}
        body = chat(max_tokens=300, temperature=1.2, **fields)
        response = client.post(CHAT, json=body)
        assert response.status_code == 200, (response.text, schema)
        if body["stream"]:
            events = [event["choices"][0] for event in sse_data(response.content)[:-1]]
            text = "".join(event["delta"].get("content", "") for event in events)
            reason = events[-1]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        if reason == "stop":
            num_stopped += 1
            assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)), (text, schema)
    assert num_stopped >= 10


def test_a_sentencepiece_vocabulary_spells_the_same_text(tmp_path: Path) -> None:
    """Its tokens begin with a mark for a space, and bytes have tokens of their own."""
    model = make_tiny_llama(tmp_path / "model", vocab_size=len(sentencepiece_pieces()[0]))
    (model / "tokenizer.json").unlink()
    write_sentencepiece_like(model, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    schema = {
        "type": "object",
        "properties": {"the name": {"type": "string", "maxLength": 20}, "n": {"enum": ["hello human", " two"]}},
        "required": ["the name", "n"],
        "additionalProperties": False,
    }
    with make_real_server(tmp_path, model=model) as server, server.client() as client:
        name = server.state.catalog.base.name
        for choice in answer(client, chat(n=4, model=name, guided_json=schema)):
            jsonschema.validate(json.loads(content(choice)), schema)
        for choice in answer(client, chat(n=4, model=name, guided_regex="[a-z ]{10}")):
            assert re.fullmatch("[a-z ]{10}", content(choice))
