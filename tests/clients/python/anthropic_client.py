"""Anthropic's Python client: https://github.com/anthropics/anthropic-sdk-python#readme."""

from typing import Literal

import anthropic
from anthropic import Anthropic
from checks import MODEL, QUESTION, URL, becomes_idle, check, run_checks
from pydantic import BaseModel, Field

client = Anthropic(base_url=URL, api_key="none")
GREEDY = {"temperature": 0}  # this version of the client has no argument for it
MESSAGES = [{"role": "user", "content": QUESTION}]
WEATHER = {
    "name": "get_weather",
    "description": "Get the current temperature of a city in degrees Celsius.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Lima", "Oslo"]}},
        "required": ["city"],
    },
}


class Recipe(BaseModel):
    dish: Literal["egg", "soup"]
    minutes: int = Field(description="from 1 to 9")
    soft: bool


@check("create")
def create() -> str:
    message = client.messages.create(model=MODEL, max_tokens=20, system="Be brief.", messages=MESSAGES)
    assert message.content[0].text
    assert message.stop_reason in ("max_tokens", "end_turn")
    assert message.usage.input_tokens > 5
    return message.content[0].text


@check("stream")
def stream() -> str:
    with client.messages.stream(model=MODEL, max_tokens=20, messages=MESSAGES) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert text == final.content[0].text
    assert final.usage.output_tokens > 0
    raw = list(client.messages.create(model=MODEL, max_tokens=5, messages=MESSAGES, stream=True))
    assert (raw[0].type, raw[-1].type) == ("message_start", "message_stop")
    return text


@check("tools: use, result, answer")
def tools() -> str:
    question = {"role": "user", "content": "What is the weather like in Paris?"}
    first = client.messages.create(
        model=MODEL,
        max_tokens=1024,
        messages=[question],
        tools=[WEATHER],
        tool_choice={"type": "any"},
        extra_body=GREEDY,
    )
    assert first.stop_reason == "tool_use", first.stop_reason
    uses = [block for block in first.content if block.type == "tool_use"]
    assert all(use.input["city"] in ("Paris", "Lima", "Oslo") for use in uses)
    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "14 degrees"} for use in uses]
    second = client.messages.create(
        model=MODEL,
        max_tokens=20,
        tools=[WEATHER],
        messages=[question, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}],
    )
    assert second.content
    return f"{len(uses)} uses"


@check("tools, streamed")
def tools_streamed() -> dict:
    with client.messages.stream(
        model=MODEL,
        max_tokens=200,
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "get_weather"},
        extra_body=GREEDY,
    ) as events:
        kinds = {event.type for event in events}
        final = events.get_final_message()
    [use] = [block for block in final.content if block.type == "tool_use"]
    assert "input_json" in kinds
    assert use.input["city"] in ("Paris", "Lima", "Oslo")
    return use.input


@check("tool runner")
def tool_runner() -> str:
    asked = []

    @anthropic.beta_tool
    def get_weather(city: Literal["Paris", "Lima"]) -> str:
        """Get the current temperature of a city.

        Args:
            city: The city.
        """
        asked.append(city)
        return "14 degrees"

    runner = client.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=60,
        extra_body=GREEDY,
        tools=[get_weather],
        tool_choice={"type": "tool", "name": "get_weather"},
        messages=[{"role": "user", "content": "What is the weather like in Paris?"}],
        max_iterations=2,
    )
    messages = list(runner)
    assert len(messages) == 2
    assert asked
    assert set(asked) <= {"Paris", "Lima"}
    return ", ".join(asked)


@check("structured output: .parse")
def parse() -> Recipe:
    message = client.messages.parse(
        model=MODEL, max_tokens=100, messages=MESSAGES, output_format=Recipe, extra_body=GREEDY
    )
    assert isinstance(message.parsed_output, Recipe), message
    return message.parsed_output


@check("count_tokens")
def count_tokens() -> str:
    counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES)
    message = client.messages.create(model=MODEL, max_tokens=1, messages=MESSAGES)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0), usage
    return f"{counted.input_tokens} tokens"


@check("errors")
def errors() -> None:
    try:
        client.messages.create(model="claude-9", max_tokens=5, messages=MESSAGES)
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"
    else:
        raise AssertionError("an unknown model was served")


@check("cancellation of a stream")
def cancel() -> None:
    with client.messages.stream(model=MODEL, max_tokens=4000, messages=MESSAGES) as events:
        for number, _ in enumerate(events):
            if number == 5:
                break
    assert becomes_idle(), "the request goes on after its client left"


if __name__ == "__main__":
    run_checks()
