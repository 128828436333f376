"""Required and named calls from a real engine with a model of random weights: the official client's own snippets."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from support.models.tiny_models import make_tiny_llama
from support.server.api_server import WAIT
from support.server.real_server import BASE, RealServer, make_real_server

QUESTION: list[Any] = [{"role": "user", "content": "Dim the light."}]
ROOMS = ["kitchen", "cellar"]
LIGHT: Any = {
    "type": "function",
    "function": {
        "name": "set_light",
        "parameters": {
            "type": "object",
            "properties": {"room": {"enum": ROOMS}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
        },
    },
}
NAMED: Any = {"type": "function", "function": {"name": "set_light"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    directory = tmp_path_factory.mktemp("forced")
    model = make_tiny_llama(directory / BASE, max_position_embeddings=4096)
    with make_real_server(directory, model=model, chat_template="chatml") as live:
        yield live


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0, timeout=WAIT) as made:
        yield made


def check(call: Any) -> None:
    assert call.function.name == "set_light"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"room", "on"}
    assert arguments["room"] in ROOMS


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_every_choice_is_calls(client: OpenAI, choice: Any) -> None:
    fields: Any = {"tools": [LIGHT], "tool_choice": choice, "parallel_tool_calls": False}  # more might not fit
    answer = client.chat.completions.create(model=BASE, messages=QUESTION, n=3, seed=1, **fields)
    for given in answer.choices:
        assert given.finish_reason == "tool_calls"
        assert given.message.content is None
        (call,) = given.message.tool_calls
        check(call)


def test_streamed_arguments_come_in_pieces(client: OpenAI) -> None:
    fields: Any = {"tools": [LIGHT], "tool_choice": NAMED}
    with client.chat.completions.stream(model=BASE, messages=QUESTION, seed=2, **fields) as stream:
        pieces = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    check(call)
    assert final.choices[0].finish_reason == "tool_calls"
    assert len(pieces) > 3
    assert "".join(pieces) == call.function.arguments


def test_a_call_that_is_cut_off_keeps_what_there_is(client: OpenAI) -> None:
    fields: Any = {"tools": [LIGHT], "tool_choice": NAMED}
    whole = client.chat.completions.create(model=BASE, messages=QUESTION, seed=2, **fields)
    written = whole.choices[0].message.tool_calls[0].function.arguments
    limit = whole.usage.completion_tokens - len("}\n</tool_call>") - 4
    (given,) = client.chat.completions.create(model=BASE, messages=QUESTION, seed=2, max_tokens=limit, **fields).choices
    assert (given.finish_reason, given.message.content) == ("length", None)
    (call,) = given.message.tool_calls
    assert written.startswith(call.function.arguments)
    assert call.function.arguments not in ("", written)


@pytest.mark.parametrize("most", [1, 6, 21])
def test_a_call_that_is_cut_off_at_its_beginning_is_a_call_all_the_same(
    server: RealServer, client: OpenAI, most: int
) -> None:
    """The model has written no more than `<tool_call>` and the like: none of it is content."""
    fields: Any = {"tools": [LIGHT], "tool_choice": NAMED}
    (given,) = client.chat.completions.create(model=BASE, messages=QUESTION, seed=2, max_tokens=most, **fields).choices
    assert (given.finish_reason, given.message.content) == ("length", None)
    (call,) = given.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("set_light", "")
    chunks = list(
        client.chat.completions.create(model=BASE, messages=QUESTION, seed=2, max_tokens=most, stream=True, **fields)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert not any(delta.content for delta in deltas)
    (name,) = [call.function.name for delta in deltas for call in delta.tool_calls or () if call.function.name]
    assert (name, chunks[-1].choices[0].finish_reason) == ("set_light", "length")
    flat = {"type": "function", "name": "set_light", "parameters": LIGHT["function"]["parameters"]}
    asked: Any = {"input": "Dim it.", "tools": [flat], "tool_choice": {"type": "function", "name": "set_light"}}
    response = client.responses.create(model=BASE, max_output_tokens=most, **asked)
    events = list(client.responses.create(model=BASE, max_output_tokens=most, stream=True, **asked))
    for made in (response, events[-1].response):
        (item,) = made.output
        assert (item.type, item.name, item.arguments, item.status) == ("function_call", "set_light", "", "incomplete")
        assert made.incomplete_details.reason == "max_output_tokens"
    body = {
        "model": BASE,
        "max_tokens": most,
        "messages": QUESTION,
        "tools": [{"name": "set_light", "input_schema": LIGHT["function"]["parameters"]}],
        "tool_choice": {"type": "tool", "name": "set_light"},
    }
    with server.client() as http:
        message = http.post("/v1/messages", json=body).json()
        streamed = http.post("/v1/messages", json={**body, "stream": True}).text
    (block,) = message["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "set_light", {})
    assert message["stop_reason"] == "max_tokens"
    assert '"type":"tool_use"' in streamed
    assert "text_delta" not in streamed


def test_the_clients_parse_helper_with_a_pydantic_tool(client: OpenAI) -> None:
    class SetLight(BaseModel):
        room: Literal["kitchen", "cellar"]
        on: bool

    fields: Any = {"tools": [openai.pydantic_function_tool(SetLight)], "tool_choice": "required"}
    answer = client.chat.completions.parse(model=BASE, messages=QUESTION, seed=3, **fields)
    call = answer.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, SetLight)


def test_tokenize_gives_the_prompt_of_a_forced_call(server: RealServer, client: OpenAI) -> None:
    body = {"model": BASE, "messages": QUESTION, "tools": [LIGHT], "tool_choice": "required"}
    with server.client() as http:
        count = http.post("/tokenize", json=body).json()["count"]
        usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == count


def test_a_schema_that_cannot_be_enforced(client: OpenAI) -> None:
    bad: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=BASE, messages=QUESTION, tools=[bad], tool_choice="required")
    assert (error.value.code, error.value.param) == ("invalid_grammar", "tools[0].function.parameters")


def test_a_strict_tool_that_may_be_called(client: OpenAI) -> None:
    """Any text may come, and where a call begins it becomes one."""
    strict = {**LIGHT, "function": {**LIGHT["function"], "strict": True}}
    answer = client.chat.completions.create(model=BASE, messages=QUESTION, tools=[strict], seed=5, max_tokens=12, n=2)
    assert all(choice.message.content and not choice.message.tool_calls for choice in answer.choices)


def test_the_other_routes_force_calls_as_well(server: RealServer, client: OpenAI) -> None:
    flat = {"type": "function", "name": "set_light", "parameters": LIGHT["function"]["parameters"], "strict": False}
    response = client.responses.create(model=BASE, input="Dim it.", tools=[flat], tool_choice="required")
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls
    assert all(json.loads(call.arguments)["room"] in ROOMS for call in calls)
    body = {
        "model": BASE,
        "max_tokens": 1000,
        "messages": QUESTION,
        "tools": [{"name": "set_light", "input_schema": LIGHT["function"]["parameters"]}],
        "tool_choice": {"type": "tool", "name": "set_light"},
    }
    with server.client() as http:
        message = http.post("/v1/messages", json=body).json()
    (block,) = message["content"]
    assert (block["type"], block["name"], message["stop_reason"]) == ("tool_use", "set_light", "tool_use")
    assert block["input"]["room"] in ROOMS
