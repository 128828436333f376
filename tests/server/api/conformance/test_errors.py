"""Errors as OpenAI's reference has them: status, type, param and code of each, and nothing but an envelope.

A row's code is OpenAI's own. OURS says where this server's word differs, on purpose.
"""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.server import openai_shapes as shapes
from support.server.api_server import BASE, LiveServer, make_state

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = {"role": "user", "content": "hello"}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": BASE, "messages": [USER]},
    COMPLETIONS: {"model": BASE, "prompt": "hello"},
    RESPONSES: {"model": BASE, "input": "hello"},
}

# OpenAI's code → this server's, which says less: the message has the limit in words.
OURS = {
    "array_above_max_length": "invalid_value",
    "decimal_above_max_value": "invalid_value",
    "decimal_below_min_value": "invalid_value",
    "empty_array": "invalid_value",
    "integer_above_max_value": "invalid_value",
    "integer_below_min_value": "invalid_value",
    "method_not_supported": "method_not_allowed",
    "unknown_url": "not_found",
}
# Whatever is wrong with the demand for a format has one code.
FORMATS = ("response_format", "text.format")

ABOVE, BELOW = "decimal_above_max_value", "decimal_below_min_value"
TOO_BIG, TOO_SMALL = "integer_above_max_value", "integer_below_min_value"
MISSING, VALUE, TYPE = "missing_required_parameter", "invalid_value", "invalid_type"

# route, what the body says differently (… : the field is left out), status, param, code
Row = tuple[str, dict[str, Any], int, str | None, str]
SAMPLING: list[Row] = [
    (route, {field: value}, 400, field, code)
    for route in (CHAT, COMPLETIONS)
    for field, value, code in (
        ("temperature", 2.1, ABOVE),
        ("temperature", -0.1, BELOW),
        ("temperature", "hot", TYPE),
        ("temperature", True, TYPE),
        ("top_p", 1.5, ABOVE),
        ("top_p", -1, BELOW),
        ("presence_penalty", 2.5, ABOVE),
        ("presence_penalty", -2.5, BELOW),
        ("frequency_penalty", 3, ABOVE),
        ("frequency_penalty", -3, BELOW),
        ("n", 0, TOO_SMALL),
        ("n", 129, TOO_BIG),
        ("n", "2", TYPE),
        ("n", True, TYPE),
        ("max_tokens", -1, TOO_SMALL),
        ("max_tokens", "many", TYPE),
        ("max_tokens", True, TYPE),
        ("seed", 2**63, TOO_BIG),
        ("seed", "x", TYPE),
        ("seed", 1.5, TYPE),
        ("stream", "yes", TYPE),
        ("stream", 1, TYPE),
        ("stop", 5, VALUE),
        ("stop", [5], VALUE),
        ("logit_bias", {"97": 101}, VALUE),
        ("logit_bias", {"x": 1}, VALUE),
        ("logit_bias", {"99999": 1}, VALUE),
        ("logit_bias", [], VALUE),
        ("stream_options", {"include_usage": True}, VALUE),
    )
]
ROWS: list[Row] = [
    *SAMPLING,
    # chat
    (CHAT, {"model": ...}, 400, "model", MISSING),
    (CHAT, {"model": 5}, 400, "model", TYPE),
    (CHAT, {"model": "gpt-4o"}, 404, "model", "model_not_found"),
    (CHAT, {"messages": ...}, 400, "messages", MISSING),
    (CHAT, {"messages": []}, 400, "messages", "empty_array"),
    (CHAT, {"messages": "hi"}, 400, "messages", TYPE),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", VALUE),
    (CHAT, {"messages": [USER, {"role": "user", "content": 5}]}, 400, "messages[1].content", VALUE),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role", MISSING),
    (CHAT, {"messages": [{**USER, "content": "x" * 100_000}]}, 400, "messages", "context_length_exceeded"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]},
        400,
        "messages[0].content",
        VALUE,
    ),
    (CHAT, {"max_completion_tokens": 0}, 400, "max_completion_tokens", TOO_SMALL),
    (CHAT, {"max_completion_tokens": 10**6}, 400, "max_completion_tokens", "context_length_exceeded"),
    (CHAT, {"logprobs": 1}, 400, "logprobs", TYPE),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", TOO_BIG),
    (CHAT, {"logprobs": True, "top_logprobs": -1}, 400, "top_logprobs", TOO_SMALL),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", VALUE),
    (CHAT, {"tool_choice": "required"}, 400, "tool_choice", VALUE),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools", VALUE),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools", VALUE),
    (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format.type", VALUE),
    (CHAT, {"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", MISSING),
    # completions
    (COMPLETIONS, {"model": ...}, 400, "model", MISSING),
    (COMPLETIONS, {"model": "davinci-002"}, 404, "model", "model_not_found"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", VALUE),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt", VALUE),
    (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt", VALUE),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", VALUE),
    (COMPLETIONS, {"prompt": ["a", [1]]}, 400, "prompt", VALUE),
    (COMPLETIONS, {"prompt": [10**6]}, 400, "prompt", VALUE),
    (COMPLETIONS, {"prompt": "x" * 100_000}, 400, "prompt", "context_length_exceeded"),
    (COMPLETIONS, {"logprobs": -1}, 400, "logprobs", TOO_SMALL),
    (COMPLETIONS, {"logprobs": True}, 400, "logprobs", TYPE),
    (COMPLETIONS, {"echo": "yes"}, 400, "echo", TYPE),
    # responses
    (RESPONSES, {"model": ...}, 400, "model", MISSING),
    (RESPONSES, {"model": "gpt-5"}, 404, "model", "model_not_found"),
    (RESPONSES, {"input": ...}, 400, "input", MISSING),
    (RESPONSES, {"input": 5}, 400, "input", VALUE),
    (RESPONSES, {"input": [{"role": "king", "content": "x"}]}, 400, "input[0].role", VALUE),
    (RESPONSES, {"temperature": 3}, 400, "temperature", ABOVE),
    (RESPONSES, {"top_p": 2}, 400, "top_p", ABOVE),
    (RESPONSES, {"max_output_tokens": 0}, 400, "max_output_tokens", TOO_SMALL),
    (RESPONSES, {"previous_response_id": "resp_none"}, 400, "previous_response_id", "previous_response_not_found"),
    (RESPONSES, {"metadata": {str(i): "x" for i in range(17)}}, 400, "metadata", VALUE),
    (RESPONSES, {"metadata": {"k" * 65: "x"}}, 400, "metadata", VALUE),
    (RESPONSES, {"metadata": {"k": "x" * 513}}, 400, "metadata", VALUE),
    (RESPONSES, {"include": ["everything"]}, 400, "include", VALUE),
    (RESPONSES, {"truncation": "sometimes"}, 400, "truncation", VALUE),
    (RESPONSES, {"text": {"format": {"type": "xml"}}}, 400, "text.format", VALUE),
    (RESPONSES, {"stream": "yes"}, 400, "stream", TYPE),
    (RESPONSES, {"tool_choice": "required"}, 400, "tool_choice", VALUE),
]


def row_id(row: Row) -> str:
    route, changed, *_ = row
    text = json.dumps(changed, default=lambda _: "left out")
    return f"{route.rpartition('/')[2]} {text[:60]}"


@pytest.mark.parametrize("row", ROWS, ids=map(row_id, ROWS))
def test_refused(http: httpx.Client, row: Row) -> None:
    route, changed, status, param, code = row
    body = {name: value for name, value in (GOOD[route] | changed).items() if value is not ...}
    answer = http.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = shapes.error(answer.json())
    ours = "invalid_grammar" if param and param.startswith(FORMATS) else OURS.get(code, code)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, ours)


# What OpenAI serves and this server, on purpose, doesn't: refused by name, never ignored. docs/http-api.md says why.
NOT_SERVED_FIELDS: list[tuple[str, str, Any]] = [
    (CHAT, "audio", {"voice": "alloy", "format": "mp3"}),
    (CHAT, "modalities", ["text", "audio"]),
    (CHAT, "web_search_options", {}),
    (CHAT, "functions", [{"name": "f", "parameters": {}}]),
    (CHAT, "function_call", "auto"),
    (CHAT, "verbosity", "low"),
    (COMPLETIONS, "suffix", "the end"),
    (RESPONSES, "background", True),
    (RESPONSES, "conversation", "conv_1"),
    (RESPONSES, "prompt", {"id": "pmpt_1"}),
    (RESPONSES, "reasoning", {"effort": "high"}),
]


@pytest.mark.parametrize(("route", "field", "value"), NOT_SERVED_FIELDS)
def test_a_field_that_is_not_served_is_refused_by_name(
    http: httpx.Client, route: str, field: str, value: object
) -> None:
    answer = http.post(route, json={**GOOD[route], field: value})
    error = shapes.error(answer.json())
    assert (answer.status_code, error["param"], error["code"]) == (400, field, "unsupported_parameter")
    assert field in error["message"]


PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "file", "file": {"file_id": "file-1"}},
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part["type"])
def test_parts_that_are_no_text_are_refused(http: httpx.Client, part: dict[str, Any]) -> None:
    answer = http.post(CHAT, json={**GOOD[CHAT], "messages": [{"role": "user", "content": [part]}]})
    error = shapes.error(answer.json())
    assert (answer.status_code, error["param"]) == (400, "messages[0].content")


TOOLS = ["web_search", "file_search", "code_interpreter", "computer_use_preview", "image_generation", "mcp", "shell"]


@pytest.mark.parametrize("kind", TOOLS)
def test_built_in_tools_are_refused(http: httpx.Client, kind: str) -> None:
    answer = http.post(RESPONSES, json={**GOOD[RESPONSES], "tools": [{"type": kind}]})
    assert answer.status_code == 400
    assert (shapes.error(answer.json())["param"] or "").startswith("tools")


# Where this server takes more, or less, than the reference: the words of the page → route, body, status.
DEVIATIONS: dict[str, tuple[str, dict[str, Any], int]] = {
    "each choice takes memory of the server": (CHAT, {"n": 9}, 400),
    "answers that nobody sees take memory, too": (COMPLETIONS, {"best_of": 9}, 400),
    "a nucleus of 0 has no tokens": (CHAT, {"top_p": 0}, 400),
    "up to 16 strings, not 4": (CHAT, {"stop": list("abcdef")}, 200),
    "up to 20, not 5": (COMPLETIONS, {"logprobs": 20}, 200),
    "ignored, and named in `X-Ignored-Fields`": (CHAT, {"no_such_field": 1}, 200),
    "there is one tier, and nothing is kept": (CHAT, {"service_tier": "no such tier"}, 200),
    "models differ in what they begin with": (COMPLETIONS, {"prompt": ...}, 400),
    "such calls have no ids": (CHAT, {"messages": [USER, {"role": "function", "name": "f", "content": "x"}]}, 400),
    "no part of a conversation is dropped silently": (RESPONSES, {"truncation": "auto"}, 400),
}
PAGE = (Path(__file__).parents[4] / "docs" / "http-api.md").read_text()
DIFFERENCES = PAGE.partition("\n## Differences from OpenAI\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("words", DEVIATIONS)
def test_deviation(http: httpx.Client, words: str) -> None:
    route, changed, status = DEVIATIONS[words]
    assert words in DIFFERENCES
    body = {field: value for field, value in (GOOD[route] | changed).items() if value is not ...}
    answer = http.post(route, json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        shapes.error(answer.json())


def test_the_page_names_what_is_refused_and_our_codes() -> None:
    named = set(re.findall(r"`(\w+)`", DIFFERENCES))
    assert {field for _, field, _ in NOT_SERVED_FIELDS} | set(OURS.values()) <= named


def test_an_ignored_field_is_named(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={**GOOD[CHAT], "no_such_field": 1, "max_tokens": 1})
    assert answer.headers["x-ignored-fields"] == "no_such_field"


# method, path, status, code
ABSENT = [
    *(
        ("POST", f"/v1/{path}", 404, "route_not_served")
        for path in (
            *("embeddings", "moderations", "images/generations", "images/edits", "images/variations"),
            *("audio/speech", "audio/transcriptions", "audio/translations", "files", "uploads", "batches"),
            *("fine_tuning/jobs", "assistants", "threads", "threads/runs", "vector_stores", "realtime/sessions"),
            *("conversations", "videos", "evals", "containers"),
        )
    ),
    *(("GET", f"/v1/{path}", 404, "route_not_served") for path in ("files", "batches", "assistants", "threads/x")),
    ("GET", "/v1/nothing", 404, "not_found"),
    ("POST", "/chat/completions", 404, "not_found"),
    ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
    ("GET", "/v1/completions", 405, "method_not_allowed"),
    ("GET", "/v1/responses", 405, "method_not_allowed"),
    ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
    ("POST", "/v1/models", 405, "method_not_allowed"),
    ("DELETE", "/v1/models/pirate", 405, "method_not_allowed"),
]


@pytest.mark.parametrize(("method", "path", "status", "code"), ABSENT)
def test_routes_that_are_not_there(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    answer = http.request(method, path, json={} if method == "POST" else None)
    error = shapes.error(answer.json())
    assert (answer.status_code, error["type"], error["code"]) == (status, "invalid_request_error", code)
    assert error["param"] is None
    assert ("allow" in answer.headers) == (status == 405)


KEYS: list[tuple[dict[str, str], str]] = [
    ({}, "missing_api_key"),
    ({"Authorization": "Bearer sk-wrong"}, "invalid_api_key"),
    ({"Authorization": "Basic c2stZ29vZA=="}, "missing_api_key"),
]


@pytest.fixture(scope="module")
def locked() -> Any:
    with LiveServer(make_state(keys=("sk-good",))) as live, live.client() as client:
        yield client


@pytest.mark.parametrize(("headers", "code"), KEYS)
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, RESPONSES, "/v1/models"])
def test_keys(locked: httpx.Client, route: str, headers: dict[str, str], code: str) -> None:
    method = "GET" if route == "/v1/models" else "POST"
    answer = locked.request(method, route, json=GOOD.get(route), headers=headers)
    error = shapes.error(answer.json())
    assert (answer.status_code, error["type"], error["code"]) == (401, "invalid_request_error", code)
    assert answer.headers["x-request-id"]
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "sk-" not in error["message"]


def test_the_right_key(locked: httpx.Client) -> None:
    answer = locked.post(CHAT, json={**GOOD[CHAT], "max_tokens": 3}, headers={"Authorization": "Bearer sk-good"})
    shapes.chat(answer.json())
