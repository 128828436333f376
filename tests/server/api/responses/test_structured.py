"""Structured output in the shapes of Responses and Messages, over the whole server and a tiny random model."""

import json
from collections.abc import Iterator
from typing import Annotated, Literal

import jsonschema
import pytest
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel, Field

from support.models.tiny_models import make_tiny_llama
from support.server.real_server import BASE, RealServer, make_real_server


class Person(BaseModel):
    name: Annotated[str, Field(max_length=8)]
    kind: Literal["cat", "dog"]


class Pet(BaseModel):
    """Anthropic's client makes descriptions of limits such as a length."""

    kind: Literal["cat", "dog"]


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
KIND = {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}}, "required": ["kind"]}
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    directory = tmp_path_factory.mktemp("structured")
    model = make_tiny_llama(directory / BASE, max_position_embeddings=2048)  # room for tools in the prompt
    with make_real_server(directory, model=model, chat_template="chatml") as live:
        yield live


@pytest.fixture
def server(shared: RealServer) -> Iterator[RealServer]:
    yield shared
    shared.assert_quiet()


@pytest.fixture(scope="module")
def client(shared: RealServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=shared.url + "/v1", api_key="x", max_retries=0) as made:
        yield made


def test_parse(server: RealServer, client: OpenAI) -> None:
    response = client.responses.parse(model=BASE, input="Hello", text_format=Person, max_output_tokens=100)
    assert response.status == "completed"
    assert isinstance(response.output_parsed, Person)
    assert response.text.format.name == "Person"
    with client.responses.stream(model=BASE, input="Hello", text_format=Person, max_output_tokens=100) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Person)


def test_a_schema_and_any_json(server: RealServer, client: OpenAI) -> None:
    schema = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    response = client.responses.create(model=BASE, input="Hello", text={"format": schema}, max_output_tokens=100)
    jsonschema.validate(json.loads(response.output_text), SCHEMA)
    stored = client.responses.retrieve(response.id)
    assert stored.text.format.to_dict() == schema


def test_what_is_wrong_with_a_schema_is_named(server: RealServer) -> None:
    with server.client() as http:
        wrong = {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}
        message = {"max_tokens": 9, "messages": MESSAGES, "output_config": {"format": wrong}}
        cases = [
            ("/v1/responses", {"input": "x", "text": {"format": wrong}}, "text.format"),
            ("/v1/responses", {"input": "x", "text": {"format": {"type": "xml"}}}, "text.format"),
            ("/v1/messages", message, "output_config"),
        ]
        for route, body, param in cases:
            response = http.post(route, json={"model": BASE, **body})
            error = response.json()["error"]
            named = error["param"] if "param" in error else error["details"]["param"]
            assert response.status_code == 400, response.text
            assert named.startswith(param), error
            assert param in error["message"]


def test_messages_with_a_schema(server: RealServer) -> None:
    with Anthropic(base_url=server.url, api_key="x", max_retries=0) as client:
        parsed = client.messages.parse(model=BASE, max_tokens=100, messages=MESSAGES, output_format=Pet)
        assert isinstance(parsed.parsed_output, Pet)
        message = client.messages.create(
            model=BASE,
            max_tokens=100,
            messages=MESSAGES,
            output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        )
    assert message.stop_reason == "end_turn"
    jsonschema.validate(json.loads(message.content[0].text), SCHEMA)


def test_a_tool_that_must_be_used(server: RealServer, client: OpenAI) -> None:
    flat = {"type": "function", "name": "look", "parameters": KIND}
    for choice in ("required", {"type": "function", "name": "look"}):
        response = client.responses.create(
            model=BASE,
            input="Hello",
            tools=[flat],
            tool_choice=choice,
            max_output_tokens=300,
            parallel_tool_calls=False,
        )
        (call,) = response.output
        assert (call.type, call.name, response.status) == ("function_call", "look", "completed")
        jsonschema.validate(json.loads(call.arguments), KIND)
    fields = {"model": BASE, "max_tokens": 300, "messages": MESSAGES, "tools": [{"name": "look", "input_schema": KIND}]}
    with Anthropic(base_url=server.url, api_key="x", max_retries=0) as anthropic:
        for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "look"}):
            message = anthropic.messages.create(**fields, tool_choice=choice)
            (block,) = message.content
            assert (block.type, block.name, message.stop_reason) == ("tool_use", "look", "tool_use")
            jsonschema.validate(block.input, KIND)
        with anthropic.messages.stream(**fields, tool_choice={"type": "tool", "name": "look"}) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            (streamed,) = stream.get_final_message().content
    assert json.loads("".join(pieces)) == streamed.input
    jsonschema.validate(streamed.input, KIND)


def test_a_call_that_is_cut_off_says_so(server: RealServer, client: OpenAI) -> None:
    flat = {
        "type": "function",
        "name": "look",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    }
    response = client.responses.create(
        model=BASE, input="Hello", tools=[flat], tool_choice="required", max_output_tokens=40
    )
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    tool = {"name": "look", "input_schema": flat["parameters"]}
    with Anthropic(base_url=server.url, api_key="x", max_retries=0) as anthropic:
        message = anthropic.messages.create(
            model=BASE, max_tokens=40, messages=MESSAGES, tools=[tool], tool_choice={"type": "any"}
        )
    assert message.stop_reason == "max_tokens"
    assert all(isinstance(block.input, dict) for block in message.content if block.type == "tool_use")
