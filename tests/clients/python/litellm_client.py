"""LiteLLM: https://docs.litellm.ai/docs/providers/openai_compatible, and its pages on tools and JSON mode."""

import json
from typing import Literal

import litellm
from checks import MODEL, QUESTION, URL, check, run_checks
from pydantic import BaseModel, Field

litellm.suppress_debug_info = True
litellm.telemetry = False
SERVER = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0}
MESSAGES = [{"role": "user", "content": QUESTION}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "enum": ["Paris", "Tokyo"]},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location"],
        },
    },
}


class Recipe(BaseModel):
    dish: Literal["egg", "soup"]
    minutes: int = Field(ge=1, le=60)


@check("completion")
def completion() -> str:
    answer = litellm.completion(messages=MESSAGES, max_tokens=20, **SERVER)
    assert answer.usage.completion_tokens == 20
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


@check("stream")
def stream() -> str:
    chunks = list(
        litellm.completion(
            messages=MESSAGES, max_tokens=20, stream=True, stream_options={"include_usage": True}, **SERVER
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == text
    assert any(getattr(chunk, "usage", None) for chunk in chunks)
    return text


@check("tools: call, result, answer")
def tools() -> str:
    messages: list = [{"role": "user", "content": "What's the weather like in Paris and Tokyo?"}]
    first = litellm.completion(messages=messages, tools=[WEATHER], tool_choice="required", max_tokens=800, **SERVER)
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        assert json.loads(call.function.arguments)["location"] in ("Paris", "Tokyo")
        messages.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "14 degrees"})
    second = litellm.completion(messages=messages, tools=[WEATHER], max_tokens=20, **SERVER)
    assert second.choices[0].message.content or second.choices[0].message.tool_calls
    return f"{len(message.tool_calls)} calls"


@check("tools, streamed")
def tools_streamed() -> str:
    named = {"type": "function", "function": {"name": "get_current_weather"}}
    chunks = list(litellm.completion(messages=MESSAGES, tools=[WEATHER], tool_choice=named, stream=True, **SERVER))
    [call] = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["location"] in ("Paris", "Tokyo")
    return call.function.arguments


@check("response_format, json_object")
def json_object() -> dict:
    question = {"role": "user", "content": 'Answer in JSON, for example {"minutes": 7}. How long does an egg boil?'}
    answer = litellm.completion(messages=[question], response_format={"type": "json_object"}, max_tokens=200, **SERVER)
    found = json.loads(answer.choices[0].message.content)
    assert isinstance(found, dict)
    return found


@check("response_format, pydantic")
def json_schema() -> Recipe:
    answer = litellm.completion(messages=MESSAGES, response_format=Recipe, **SERVER)
    return Recipe.model_validate_json(answer.choices[0].message.content)


@check("hosted_vllm/")
def hosted_vllm() -> str:
    answer = litellm.completion(messages=MESSAGES, max_tokens=8, **{**SERVER, "model": f"hosted_vllm/{MODEL}"})
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


@check("text_completion")
def text_completion() -> str:
    answer = litellm.text_completion(
        prompt="One, two,", max_tokens=5, **{**SERVER, "model": f"text-completion-openai/{MODEL}"}
    )
    assert answer.choices[0].text
    return answer.choices[0].text


@check("responses")
def responses() -> str:
    answer = litellm.responses(input=QUESTION, max_output_tokens=20, **SERVER)
    assert answer.output[0].content[0].text
    return answer.output[0].content[0].text


@check("errors")
def errors() -> None:
    try:
        litellm.completion(messages=MESSAGES, **{**SERVER, "model": "openai/gpt-4o"})
    except litellm.NotFoundError:
        return
    raise AssertionError("an unknown model was served")


if __name__ == "__main__":
    run_checks()
