"""Every part of a Messages or Responses body replaced by what doesn't belong there: refused or served, never a 500."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from support.server.api_server import BASE, PIRATE, LiveServer, make_state

CANARY = "kanari9f3a"
TOOL_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TEXT = {"type": "text", "text": "rain"}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/messages": {
        "model": BASE,
        "max_tokens": 1,
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "hello"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "?", "signature": "s"},
                    {"type": "text", "text": "I look"},
                    {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"city": "x"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": False, "content": [TEXT]},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": TOOL_SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "metadata": {"user_id": "ann"},
        "stop_sequences": ["zz"],
        "temperature": 0.5,
        "top_k": 5,
        "thinking": {"type": "disabled"},
        "output_config": {"effort": "low"},
        "stream": False,
        "adapters": [{"name": PIRATE, "scale": 1.0}],
    },
    "/v1/responses": {
        "model": BASE,
        "max_output_tokens": 1,
        "instructions": "be brief",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": '{"city": "x"}'},
            {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "rain"}]},
        ],
        "tools": [{"type": "function", "name": "f", "description": "d", "parameters": TOOL_SCHEMA, "strict": False}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "temperature": 0.5,
        "truncation": "disabled",
        "store": False,
        "stream": False,
        "parallel_tool_calls": True,
        "adapters": [{"name": PIRATE, "scale": 1.0}],
    },
}  # fmt: skip
HOSTILE = (None, True, 10**30, CANARY, [CANARY], {CANARY: CANARY}, {"type": CANARY}, [{"type": ["x"]}], "x" * 20_000)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from paths(inner, (*path, key))


def value_at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def replaced(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(body)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("route", "also"), [("/v1/messages", "/v1/messages/count_tokens"), ("/v1/responses", "/v1/responses/input_tokens")]
)
def test_nothing_hostile_breaks_the_server_or_is_echoed(route: str, also: str) -> None:
    good = GOOD[route]
    wrong, num_refused = [], 0
    with LiveServer(make_state()) as server, server.client() as client:
        assert client.post(route, json=good).status_code == 200
        assert client.post(also, json=good).status_code == 200
        cases = list(itertools.product(paths(good), HOSTILE))
        for target, (path, value) in zip(itertools.cycle((route, also)), cases, strict=False):
            response = client.post(target, json=replaced(good, path, value))
            is_error = response.status_code != 200
            num_refused += is_error
            is_well = not is_error or (CANARY not in response.text and "error" in response.json())
            if response.status_code >= 500 or not is_well:
                wrong.append((target, path, str(value)[:80], response.status_code, response.text[:300]))
        server.assert_quiet()
    assert not wrong, wrong[:5]
    assert num_refused > 200, "most of it is refused"


@pytest.mark.parametrize("route", GOOD)
def test_no_integer_that_an_answer_repeats_breaks_it(route: str) -> None:
    """Beyond 64 bits, anywhere in the body: the JSON of answers can't hold it."""
    good = GOOD[route]
    places = [path for path in paths(good) if isinstance(value_at(good, path), dict)]
    bodies = [replaced(good, (*path, "more"), 10**30) for path in places]
    bodies += [{**good, "text": {"format": {"type": "text", "more": 10**30}}}, {**good, "max_tool_calls": 10**30}]
    with LiveServer(make_state()) as server, server.client() as client:
        found = [client.post(route, json={**body, "stream": stream}) for body in bodies for stream in (False, True)]
        server.assert_quiet()
    assert {response.status_code for response in found} <= {200, 400}
    assert all(response.content for response in found)
