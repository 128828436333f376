"""Responses as OpenAI's reference has them: created, streamed event by event, kept, read, cancelled and deleted."""

from typing import Any

import httpx
import pytest

from support.server import openai_shapes as shapes
from support.server.api_server import BASE, PIRATE, LiveServer

ROUTE = "/v1/responses"
USER = {"role": "user", "content": "hello"}
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather now.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALL = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Rome"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}

# name → the body's fields; the model, an input and max_output_tokens: 12 are there if a row doesn't say more
ACCEPTED: dict[str, dict[str, Any]] = {
    "a text": {},
    "an adapter as the model": {"model": PIRATE},
    "messages": {"input": [USER]},
    "messages with a type": {"input": [{"type": "message", **USER}]},
    "parts": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]},
    "a developer's message": {"input": [{"role": "developer", "content": "be brief"}, USER]},
    "a system message": {"input": [{"role": "system", "content": "be brief"}, USER]},
    "an assistant's message": {"input": [USER, {"role": "assistant", "content": "hi"}, USER]},
    "an answer of ours as input": {
        "input": [
            USER,
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "hi", "annotations": [], "logprobs": []}],
            },
            USER,
        ]
    },
    "a call and its result": {"input": [USER, CALL, RESULT], "tools": [TOOL]},
    "a result as parts": {
        "input": [USER, CALL, {**RESULT, "output": [{"type": "input_text", "text": "sunny"}]}],
        "tools": [TOOL],
    },
    "instructions": {"instructions": "be brief"},
    "no limit": {"max_output_tokens": None},
    "temperature": {"temperature": 0.2},
    "top_p": {"top_p": 0.9},
    "metadata": {"metadata": {"team": "a"}},
    "sixteen pairs of metadata": {"metadata": {f"k{i}": "x" * 512 for i in range(16)}},
    "store false": {"store": False},
    "store true": {"store": True},
    "text": {"text": {"format": {"type": "text"}}},
    "verbosity": {"text": {"verbosity": "low"}},
    "truncation disabled": {"truncation": "disabled"},
    "tools": {"tools": [TOOL]},
    "tools and none": {"tools": [TOOL], "tool_choice": "none"},
    "tools one by one": {"tools": [TOOL], "parallel_tool_calls": False},
    "include logprobs": {"include": ["message.output_text.logprobs"]},
    "include top_logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 3},
    "include what never comes": {"include": ["reasoning.encrypted_content"]},
    "no reasoning": {"reasoning": {"effort": None, "summary": None}},
    "user": {"user": "user-1"},
    "safety_identifier": {"safety_identifier": "hash"},
    "prompt_cache_key": {"prompt_cache_key": "key"},
    "service_tier": {"service_tier": "auto"},
    "background false": {"background": False},
    "max_tool_calls": {"max_tool_calls": 3},
    "every optional field null": dict.fromkeys(
        (
            *("background", "conversation", "include", "instructions", "max_output_tokens", "max_tool_calls"),
            *(
                "metadata",
                "parallel_tool_calls",
                "previous_response_id",
                "prompt",
                "reasoning",
                "service_tier",
                "store",
            ),
            *("temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "stream_options"),
        )
    ),
}


def body_of(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": BASE, "input": "hello", "max_output_tokens": 12, **fields}


def ask(http: httpx.Client, fields: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(ROUTE, json=body_of(fields))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return shapes.response(answer.json())


def ask_stream(http: httpx.Client, fields: dict[str, Any]) -> list[dict[str, Any]]:
    answer = http.post(ROUTE, json={**body_of(fields), "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    return shapes.response_events(shapes.named_events(answer.content))


def text_of(response: dict[str, Any]) -> str:
    return "".join(p["text"] for item in response["output"] if item["type"] == "message" for p in item["content"])


@pytest.mark.parametrize("name", ACCEPTED)
def test_whole(http: httpx.Client, name: str) -> None:
    fields = ACCEPTED[name]
    response = ask(http, fields)
    assert response["object"] == "response"
    assert response["model"] == fields.get("model", BASE)
    ended = "incomplete" if fields.get("max_output_tokens", 12) else "completed"
    assert response["status"] == ended
    assert (response["incomplete_details"] == {"reason": "max_output_tokens"}) == (ended == "incomplete")
    assert text_of(response)
    for echoed in (
        "instructions",
        "temperature",
        "top_p",
        "store",
        "max_output_tokens",
        "user",
        "previous_response_id",
    ):
        if fields.get(echoed) is not None:
            assert response[echoed] == fields[echoed]
    assert response["metadata"] == (fields.get("metadata") or {})
    assert [tool["name"] for tool in response["tools"]] == [tool["name"] for tool in fields.get("tools") or ()]
    (part,) = response["output"][-1]["content"]
    assert bool(part.get("logprobs")) == ("message.output_text.logprobs" in (fields.get("include") or ()))


@pytest.mark.parametrize("name", ACCEPTED)
def test_stream_says_what_the_whole_answer_says(http: httpx.Client, name: str) -> None:
    whole, events = ask(http, ACCEPTED[name]), ask_stream(http, ACCEPTED[name])
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert text_of(last) == text_of(whole)
    assert last["usage"] == whole["usage"]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    assert "".join(deltas) == done["text"] == text_of(whole)


def test_events_come_in_order(http: httpx.Client) -> None:
    events = ask_stream(http, {})
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for kind in kinds if kind != "output_text.delta"] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    items = {event["item_id"] for event in events if "item_id" in event}
    assert items == {event["item"]["id"] for event in events if "item" in event}
    assert {event.get("output_index", 0) for event in events} == {0}
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []


def test_a_call_in_a_stream(http: httpx.Client, server: LiveServer) -> None:
    server.script(reply='<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>')
    events = ask_stream(http, {"tools": [TOOL], "max_output_tokens": 500})
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert "".join(deltas) == done["arguments"] == '{"city": "Rome"}'
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "get_weather", "completed")
    assert item["call_id"]
    assert events[-1]["response"]["status"] == "completed"


def test_kept_and_read_again(http: httpx.Client) -> None:
    made = ask(http, {})
    read = http.get(f"{ROUTE}/{made['id']}")
    assert shapes.response(read.json()) == made


def test_a_stream_is_kept_too(http: httpx.Client) -> None:
    last = ask_stream(http, {})[-1]["response"]
    assert http.get(f"{ROUTE}/{last['id']}").json() == last


def test_deleted(http: httpx.Client) -> None:
    made = ask(http, {})
    gone = http.delete(f"{ROUTE}/{made['id']}")
    assert gone.json() == {"id": made["id"], "object": "response", "deleted": True}
    assert http.get(f"{ROUTE}/{made['id']}").status_code == 404
    assert http.delete(f"{ROUTE}/{made['id']}").status_code == 404


def test_cancelling_what_has_ended_changes_nothing(http: httpx.Client) -> None:
    made = ask(http, {})
    assert shapes.response(http.post(f"{ROUTE}/{made['id']}/cancel").json()) == made


def test_not_kept(http: httpx.Client) -> None:
    made = ask(http, {"store": False})
    assert made["store"] is False
    assert http.get(f"{ROUTE}/{made['id']}").status_code == 404


def test_goes_on(http: httpx.Client) -> None:
    first = ask(http, {"max_output_tokens": None})
    second = ask(http, {"previous_response_id": first["id"]})
    assert second["previous_response_id"] == first["id"]
    spelled_out = ask(http, {"input": [USER, {"role": "assistant", "content": text_of(first)}, USER]})
    assert text_of(second) == text_of(spelled_out)
    assert second["usage"]["input_tokens"] == spelled_out["usage"]["input_tokens"]


def test_instructions_are_of_one_request(http: httpx.Client) -> None:
    first = ask(http, {"instructions": "be brief", "max_output_tokens": None})
    second = ask(http, {"previous_response_id": first["id"]})
    assert second["instructions"] is None
    spelled_out = ask(http, {"input": [USER, {"role": "assistant", "content": text_of(first)}, USER]})
    assert text_of(second) == text_of(spelled_out)


def test_input_items(http: httpx.Client) -> None:
    made = ask(http, {"input": [{"role": "user", "content": f"m{i}"} for i in range(3)]})
    page = http.get(f"{ROUTE}/{made['id']}/input_items").json()
    assert set(page) == {"object", "data", "first_id", "last_id", "has_more"}
    assert page["object"] == "list"
    texts = [item["content"][0]["text"] for item in page["data"]]
    assert texts == ["m2", "m1", "m0"]
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
    first = http.get(f"{ROUTE}/{made['id']}/input_items", params={"limit": 2, "order": "asc"}).json()
    assert [item["content"][0]["text"] for item in first["data"]] == ["m0", "m1"]
    assert first["has_more"] is True
    params = {"after": first["last_id"], "order": "asc"}
    rest = http.get(f"{ROUTE}/{made['id']}/input_items", params=params).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["m2"]
    assert rest["has_more"] is False


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "msg_no"}])
def test_input_items_asked_for_wrongly(http: httpx.Client, params: dict[str, Any]) -> None:
    answer = http.get(f"{ROUTE}/{ask(http, {})['id']}/input_items", params=params)
    assert answer.status_code == 400
    assert shapes.error(answer.json())["param"] in params


MISSING = [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")]


@pytest.mark.parametrize("response_id", ["resp_none", "x" * 500, "%F0%9F%A6%99", "%00"])
@pytest.mark.parametrize(("method", "rest"), MISSING)
def test_no_such_response(http: httpx.Client, method: str, rest: str, response_id: str) -> None:
    answer = http.request(method, f"{ROUTE}/{response_id}{rest}")
    error = shapes.error(answer.json())
    assert (answer.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "response_not_found")


def test_input_tokens(http: httpx.Client) -> None:
    body = body_of({})
    counted = http.post(f"{ROUTE}/input_tokens", json=body).json()
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": ask(http, {})["usage"]["input_tokens"],
    }
