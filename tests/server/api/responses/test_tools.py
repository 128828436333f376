"""Tools on /v1/responses, with OpenAI's client: calls in whole and streamed responses, their outputs, choices."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response

from support.server.api_server import BASE, WAIT, LiveServer

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
ARGUMENTS = '{"city": "Zürich"}'
ASKED: dict[str, Any] = {"model": BASE, "input": "Weather?", "tools": [WEATHER]}


@pytest.fixture(scope="module")
def client(shared: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=shared.url + "/v1", api_key="x", max_retries=0, timeout=WAIT) as made:
        yield made


def test_a_call_and_its_output(server: LiveServer, client: OpenAI) -> None:
    server.script(reply="I look. " + CALL)
    raw = client.responses.with_raw_response.create(**ASKED)
    response = Response.model_validate_json(raw.content, strict=True)
    message, call = response.output
    assert (message.content[0].text, message.status) == ("I look.", "completed")
    assert (call.type, call.name, call.arguments, call.status) == (
        "function_call",
        "get_weather",
        ARGUMENTS,
        "completed",
    )
    assert response.tools[0].name == "get_weather"
    assert (response.tool_choice, response.status) == ("auto", "completed")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    server.script(reply="It rains.")
    by_id = client.responses.create(model=BASE, input=[output], previous_response_id=response.id)
    prompt = server.engine.requests[-1].prompt_token_ids
    whole = client.responses.create(
        model=BASE, input=[{"role": "user", "content": "Weather?"}, *response.output, output], store=False
    )
    assert server.engine.requests[-1].prompt_token_ids == prompt, "by id or written out, it is the same conversation"
    assert by_id.output_text == whole.output_text == "It rains."
    text = server.state.tokenizer.decode(prompt)
    assert text.index("I look.") < text.index("get_weather") < text.index("rain")
    items = client.responses.input_items.list(by_id.id, order="asc").data
    assert [item.type for item in items] == ["message", "message", "function_call", "function_call_output"]


def test_calls_in_a_stream(server: LiveServer, client: OpenAI) -> None:
    server.script(reply="I look.\n" + CALL + "\n" + CALL.replace("Zürich", "Basel"))
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    first = kinds.index("output_item.done") + 1
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds[first:] == [*call, *call, "completed"]
    assert [event.output_index for event in events[first:-1]] == [1] * 4 + [2] * 4
    added, _, done, _ = events[first : first + 4]
    assert (added.item.arguments, added.item.status, done.arguments) == ("", "in_progress", ARGUMENTS)
    assert added.item.id == done.item_id
    final = events[-1].response
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert [item.arguments for item in final.output[1:]] == [ARGUMENTS, ARGUMENTS.replace("Zürich", "Basel")]
    with client.responses.stream(**ASKED) as stream:
        assert stream.get_final_response().output[1].arguments == ARGUMENTS


def test_a_response_may_be_a_call_alone(server: LiveServer, client: OpenAI) -> None:
    server.script(reply=CALL)
    assert [item.type for item in client.responses.create(**ASKED).output] == ["function_call"]


def test_choices(server: LiveServer, client: OpenAI) -> None:
    server.script(reply=CALL + "\n" + CALL)
    none = client.responses.create(**ASKED, tool_choice="none")
    assert ([item.type for item in none.output], none.tool_choice) == (["message"], "none")
    one = client.responses.create(**ASKED, parallel_tool_calls=False)
    assert [item.type for item in one.output].count("function_call") == 1
    assert one.parallel_tool_calls is False


def test_what_is_wrong_is_named(server: LiveServer, client: OpenAI) -> None:
    def refusal(**fields: Any) -> tuple[str | None, str | None]:
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**{**ASKED, **fields})
        assert refused.value.param is not None
        assert refused.value.param in refused.value.message
        return refused.value.param, refused.value.code

    for built_in in ("web_search", "file_search", "code_interpreter", "mcp", "image_generation", "custom"):
        assert refusal(tools=[{"type": built_in}]) == ("tools[0]", "unsupported_parameter")
    assert refusal(tools=[{**WEATHER, "name": "no name"}])[0] == "tools"
    assert refusal(tool_choice="some")[0] == "tool_choice"
    assert refusal(tool_choice={"type": "function", "name": "other"})[0] == "tool_choice"
    output = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
    assert refusal(input=[output])[0] == "input"
    call = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{"}
    assert refusal(input=[call, output])[0] == "input"
    assert refusal(input=[{**call, "arguments": {}}, output])[0] == "input[0].arguments"
