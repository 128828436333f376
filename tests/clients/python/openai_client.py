"""OpenAI's Python client: https://github.com/openai/openai-python#readme and its helpers.md."""

import asyncio
import json
from typing import Literal

import openai
from checks import MODEL, QUESTION, URL, becomes_idle, check, requests_in_work, run_checks
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

client = OpenAI(base_url=f"{URL}/v1", api_key="none")
MESSAGES = [{"role": "user", "content": QUESTION}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current temperature of a city in degrees Celsius.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Lima", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
WEATHER_QUESTION = [{"role": "user", "content": "What is the weather like in Paris today?"}]


class Event(BaseModel):
    day: Literal["Monday", "Friday"]
    hour: int = Field(ge=0, le=23)
    guests: list[Literal["Alice", "Bob", "Carol"]] = Field(max_length=3)


@check("chat")
def chat() -> str:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20
    return answer.choices[0].message.content


@check("chat with log-probabilities")
def chat_logprobs() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 4
    assert all(len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob for token in tokens)


@check("stream")
def stream() -> str:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    return f"{len(chunks)} chunks"


@check("streaming helper")
def streaming_helper() -> str:
    # The helper raises when an answer is cut; this adapter's answers are short.
    with client.chat.completions.stream(model="terse", messages=MESSAGES, max_tokens=60, temperature=0) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].finish_reason == "stop"
    return final.choices[0].message.content


@check("chat .parse")
def chat_parse() -> Event:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Extract the event information."},
            {"role": "user", "content": "Alice and Bob are going to a science fair on Friday at 10."},
        ],
        response_format=Event,
        temperature=0,
    )
    assert answer.choices[0].finish_reason == "stop"
    event = answer.choices[0].message.parsed
    assert isinstance(event, Event)
    return event


@check("chat stream .parse")
def chat_stream_parse() -> Event:
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, response_format=Event, temperature=0) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert "content.done" in kinds
    assert isinstance(final.choices[0].message.parsed, Event)
    return final.choices[0].message.parsed


@check("json_object")
def json_object() -> dict:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": 'Answer in JSON, for example {"eggs": 2}. How many eggs?'}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
    )
    assert answer.choices[0].finish_reason == "stop", answer.choices[0].message.content
    found = json.loads(answer.choices[0].message.content)
    assert isinstance(found, dict)
    return found


@check("tools: call, result, answer")
def tools() -> str:
    messages = list(WEATHER_QUESTION)
    first = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="required", temperature=0
    )
    assert first.choices[0].finish_reason == "tool_calls"
    messages.append(first.choices[0].message)
    for call in first.choices[0].message.tool_calls:
        assert call.function.name == "get_weather"
        city = json.loads(call.function.arguments)["city"]
        assert city in ("Paris", "Lima", "Oslo")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"{city}: 14 degrees"})
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], max_tokens=40)
    assert second.choices[0].message.content or second.choices[0].message.tool_calls
    return f"{len(first.choices[0].message.tool_calls)} calls"


@check("tools, streamed")
def tools_streamed() -> str:
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=WEATHER_QUESTION,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        stream=True,
    )
    calls: dict = {}
    for chunk in chunks:
        for part in chunk.choices[0].delta.tool_calls or []:
            if part.index not in calls:
                calls[part.index] = part
            else:
                calls[part.index].function.arguments += part.function.arguments
    assert [call.function.name for call in calls.values()] == ["get_weather"]
    assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Lima", "Oslo")
    return calls[0].function.arguments


@check("tools, .parse with pydantic_function_tool")
def tools_parse() -> Event:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Event)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
    )
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Event)
    return call.function.parsed_arguments


@check("tools with tool_choice none")
def tools_none() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=WEATHER_QUESTION, tools=[WEATHER], tool_choice="none", max_tokens=20
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


@check("errors")
def errors() -> None:
    try:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    except openai.NotFoundError as error:
        assert (error.code, error.param) == ("model_not_found", "model"), error
    else:
        raise AssertionError("an unknown model was served")
    try:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=5)
    except openai.BadRequestError as error:
        assert error.param == "temperature", error
        assert error.request_id
    else:
        raise AssertionError("temperature 5 was accepted")


@check("time-out and retries")
def retries() -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    try:
        client.with_options(timeout=0.5, max_retries=1).chat.completions.create(**asked)
    except openai.APITimeoutError:
        assert becomes_idle(), "requests go on after their clients left"
    else:
        raise AssertionError("4000 tokens in half a second")


@check("cancellation of a stream")
def cancel() -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    chunks = client.chat.completions.create(**asked, stream=True)
    for number, _ in enumerate(chunks):
        if number == 5:
            break
    assert requests_in_work() == 1
    chunks.close()
    assert becomes_idle(), "the request goes on after its client left"


@check("cancellation of asyncio tasks")
async def cancel_async() -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as aclient:
        tasks = [asyncio.create_task(aclient.chat.completions.create(**asked)) for _ in range(4)]
        while await asyncio.to_thread(requests_in_work) < 4:
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert await asyncio.to_thread(becomes_idle), "requests go on after their clients left"


@check("completions")
def completions() -> None:
    answer = client.completions.create(model=MODEL, prompt=["One, two,", "Three, four,"], max_tokens=4, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(len(choice.logprobs.tokens) == 4 for choice in answer.choices)


@check("responses")
def responses() -> str:
    answer = client.responses.create(
        model=MODEL, instructions="You talk like a pirate.", input=QUESTION, max_output_tokens=20
    )
    assert answer.output_text
    assert answer.status in ("completed", "incomplete")
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    return answer.output_text


@check("responses, streamed")
def responses_streamed() -> str:
    events = list(client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=20, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=20) as helper:
        kinds = [event.type for event in helper]
    assert kinds[0] == "response.created"
    return f"{len(events)} events"


@check("responses .parse")
def responses_parse() -> Event:
    answer = client.responses.parse(model=MODEL, input=QUESTION, text_format=Event, temperature=0)
    assert isinstance(answer.output_parsed, Event)
    return answer.output_parsed


@check("responses, previous_response_id")
def responses_go_on() -> None:
    first = client.responses.create(model=MODEL, input="My name is Ann.", max_output_tokens=10)
    second = client.responses.create(
        model=MODEL, previous_response_id=first.id, input="What is my name?", max_output_tokens=10
    )
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens + 5
    client.responses.delete(first.id)


@check("responses, tools")
def responses_tools() -> str:
    tool = {"type": "function", **WEATHER["function"]}
    items: list = list(WEATHER_QUESTION)
    first = client.responses.create(model=MODEL, input=items, tools=[tool], tool_choice="required", temperature=0)
    items += first.output
    calls = [item for item in first.output if item.type == "function_call"]
    assert calls
    for call in calls:
        assert json.loads(call.arguments)["city"] in ("Paris", "Lima", "Oslo")
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "14 degrees"})
    second = client.responses.create(model=MODEL, input=items, tools=[tool], max_output_tokens=20)
    assert second.output
    return f"{len(calls)} calls"


@check("models")
def models() -> None:
    names = [model.id for model in client.models.list()]
    assert names == [MODEL, "pirate", "terse"], names


if __name__ == "__main__":
    run_checks()
