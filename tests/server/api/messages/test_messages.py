"""Anthropic's Messages API over HTTP: what reaches the engine, the exact events, every error in its own envelope."""

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from guanaco.server.api.generation.ignored import HEADER
from guanaco.server.api.generation.protocol import ChatBody
from guanaco.server.api.messages.protocol import MESSAGES_FIELDS
from guanaco.server.api.values.unsupported import REFUSED
from support.server.api_server import BASE, MAX_MODEL_LEN, PIRATE, LiveServer, http_post, make_state
from support.server.fake_engine import ASSISTANT, BOS, END, SYSTEM, USER, FakeTemplate, reply_of
from support.server.one_adapter import OneAdapter

ROUTE, COUNT = "/v1/messages", "/v1/messages/count_tokens"
KEYS = ("sk-a", "sk-b")
USED = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
CALLED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [USED]}]


def body(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": BASE, "max_tokens": 5, "messages": [{"role": "user", "content": content}], **fields}


def events_of(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(event's name, its data) of each event; comments are left out."""
    events = []
    for part in raw.decode().split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    """(status, Anthropic's type, our code) of an error in Anthropic's envelope."""
    answer = response.json()
    assert set(answer) == {"type", "error", "request_id"}
    assert answer["type"] == "error"
    assert set(answer["error"]) == {"type", "message", "details"}
    if answer["request_id"] is not None:
        assert answer["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return response.status_code, answer["error"]["type"], answer["error"]["details"]["error_code"]


def test_the_sequence_of_events(client: httpx.Client, server: LiveServer) -> None:
    response = client.post(ROUTE, json=body(stream=True))
    text = reply_of(server.engine.requests[-1])[:5]
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.content)
    assert [name for name, _ in events] == [
        "message_start",
        "content_block_start",
        "ping",
        *["content_block_delta"] * 5,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(data["type"] == name for name, data in events)
    by_name = dict(events)
    started = by_name["message_start"]["message"]
    assert {key: started[key] for key in ("type", "role", "model", "content", "stop_reason", "stop_sequence")} == {
        "type": "message",
        "role": "assistant",
        "model": BASE,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }
    assert (started["usage"]["input_tokens"], started["usage"]["output_tokens"]) == (9, 0)
    assert by_name["content_block_start"] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    deltas = [data for name, data in events if name == "content_block_delta"]
    assert [delta["delta"] for delta in deltas] == [{"type": "text_delta", "text": char} for char in text]
    assert {delta["index"] for delta in deltas} == {0}
    assert by_name["message_delta"]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert by_name["message_delta"]["usage"]["output_tokens"] == 5
    assert b"[DONE]" not in response.content


def test_a_message_without_any_text_still_has_its_block(client: httpx.Client) -> None:
    fields = {"max_tokens": 500, "stop_sequences": ["alpha", "bravo", "ca", "delta", "écho", "f€", "golf", "🦙"]}
    whole = client.post(ROUTE, json=body(**fields)).json()
    assert whole["content"] == [{"type": "text", "text": ""}]
    assert (whole["stop_reason"], whole["stop_sequence"] in fields["stop_sequences"]) == ("stop_sequence", True)
    names = [name for name, _ in events_of(client.post(ROUTE, json=body(stream=True, **fields)).content)]
    assert names[1:4] == ["content_block_start", "ping", "content_block_stop"]


def test_prompt_goes_through_the_template(client: httpx.Client, server: LiveServer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "three"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "?", "signature": "s"}, {"type": "text", "text": "A"}],
        },
        {"role": "user", "content": "🦙"},
    ]
    system = [{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "kind"}]
    response = client.post(ROUTE, json=body(messages=messages, system=system))
    assert response.status_code == 200
    assert HEADER not in response.headers
    expected = [BOS, SYSTEM, *b"be\nkind", END, USER, *b"one\ntwo\nthree", END, ASSISTANT, *b"A", END]
    expected += [USER, *"🦙".encode(), END, ASSISTANT]
    assert list(server.engine.requests[-1].prompt_token_ids) == expected
    counted = client.post(COUNT, json={"model": BASE, "messages": messages, "system": system}).json()
    assert counted == {"input_tokens": len(expected)}


def test_the_answer_goes_on_with_the_assistants_last_words(client: httpx.Client, server: LiveServer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    assert client.post(ROUTE, json=body(messages=messages)).status_code == 200
    expected = [BOS, USER, *b"a", END, ASSISTANT, *b"b"]
    assert list(server.engine.requests[-1].prompt_token_ids) == expected
    assert client.post(COUNT, json={"model": BASE, "messages": messages}).json() == {"input_tokens": len(expected)}


def test_every_sampling_field_reaches_the_engine(client: httpx.Client, server: LiveServer) -> None:
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "seed": 3, "min_p": 0.125, "repetition_penalty": 1.5}
    fields |= {"ignore_eos": True}
    assert client.post(ROUTE, json=body(**fields, stop_sequences=["zz"])).status_code == 200
    params = server.engine.requests[-1].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop_strings, params.max_tokens) == (("zz",), 5)


def test_stop_reasons(client: httpx.Client, server: LiveServer) -> None:
    ended = client.post(ROUTE, json=body(max_tokens=1000)).json()
    assert (ended["stop_reason"], ended["stop_sequence"]) == ("end_turn", None)
    assert ended["content"][0]["text"] == reply_of(server.engine.requests[-1])
    cut = client.post(ROUTE, json=body(max_tokens=3)).json()
    assert (cut["stop_reason"], cut["usage"]["output_tokens"]) == ("max_tokens", 3)


def test_the_templates_own_stop_string_ends_a_turn() -> None:
    state = make_state()
    state.tokenizer.chat_template = FakeTemplate(stop_strings=("a", "o", "e"))
    with LiveServer(state) as server, server.client() as client:
        answer = client.post(ROUTE, json=body(max_tokens=1000)).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)


def test_max_tokens_beyond_the_context_means_all_of_it(client: httpx.Client, server: LiveServer) -> None:
    """The field is compulsory, and clients' usual values are larger than a small model's context."""
    assert client.post(ROUTE, json=body(max_tokens=10 * MAX_MODEL_LEN)).json()["stop_reason"] == "end_turn"
    assert server.engine.requests[-1].params.max_tokens == MAX_MODEL_LEN - 9
    long = "x" * (MAX_MODEL_LEN - 10)
    answer = client.post(ROUTE, json=body(long, max_tokens=500)).json()
    room = server.engine.requests[-1].params.max_tokens
    assert (answer["stop_reason"], answer["usage"]["output_tokens"]) == ("model_context_window_exceeded", room)
    refused = client.post(ROUTE, json=body(long + "x" * 20))
    assert error_of(refused) == (400, "invalid_request_error", "context_length_exceeded")
    assert refused.json()["error"]["details"]["param"] == "messages"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]}, "messages[0].content[0]"),
        ({"messages": CALLED}, "messages"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"system": 5}, "system"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"metadata": {"user_id": 1}}, "metadata.user_id"),
        ({"adapters": [{"name": "nobody"}]}, "adapters[0].name"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    good = body()
    response = client.post(ROUTE, json={name: value for name, value in {**good, **change}.items() if value is not None})
    status, _, _ = error_of(response)
    error = response.json()["error"]
    assert (status, error["details"]["param"]) == (404 if "nobody" in str(change) else 400, param)
    assert param in error["message"]


def test_each_refused_field_is_refused_by_name(client: httpx.Client) -> None:
    wrong = []
    for name in MESSAGES_FIELDS.refused:
        for route in (ROUTE, COUNT):
            response = client.post(route, json={**body(), name: {"x": ["asks for something"]}})
            error = response.json()["error"]
            named = (response.status_code, error["details"]["param"]) == (400, name) and name in error["message"]
            if not named or MESSAGES_FIELDS.instead.get(name, "") not in error["message"]:
                wrong.append((route, name, response.text))
    assert not wrong


def test_no_field_of_chat_is_dropped_silently() -> None:
    """A field that chat has is this route's own, refused, or on the list of those that change nothing."""
    lists = MESSAGES_FIELDS.own | MESSAGES_FIELDS.refused.keys() | MESSAGES_FIELDS.harmless
    assert (ChatBody.model_fields.keys() | REFUSED.keys()) - lists == {"user", "stream_options"}
    assert not MESSAGES_FIELDS.own & MESSAGES_FIELDS.refused.keys()
    assert not MESSAGES_FIELDS.own & MESSAGES_FIELDS.harmless


def test_what_asks_for_nothing_or_changes_nothing_passes_unnamed(client: httpx.Client) -> None:
    neutral = {name: values[0] for name, values in MESSAGES_FIELDS.refused.items() if values}
    nulls = dict.fromkeys(MESSAGES_FIELDS.refused.keys() - neutral.keys())
    for extra in (neutral, nulls, dict.fromkeys(MESSAGES_FIELDS.harmless, "x"), {"thinking": {"type": "disabled"}}):
        response = client.post(ROUTE, json={**body(), **extra})
        assert response.status_code == 200, response.text
        assert HEADER not in response.headers


def test_what_is_ignored_is_counted_and_named(client: httpx.Client, server: LiveServer) -> None:
    def count() -> float:
        return server.state.metrics.registry.get_sample_value("guanaco_ignored_fields_total") or 0.0

    before = count()
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-2025-01-01,b-2025-01-01"}
    for route in (ROUTE, COUNT):
        parts = [{"type": "text", "text": "x", "mood": 1}]
        response = client.post(route, json=body(parts, no_such_field=1), headers=headers)
        assert response.status_code == 200
        assert response.headers[HEADER] == "no_such_field, messages.content.mood, anthropic-beta"
    assert count() == before + 6
    assert HEADER not in client.post(ROUTE, json=body(), headers={"anthropic-version": "2099-01-01"}).headers


class TestErrorsBeforeTheRoute:
    """What the connection, the keys and the gate refuse comes in Anthropic's envelope on these paths, too."""

    def test_parser(self, server: LiveServer) -> None:
        huge = server.raw(b"POST /v1/messages HTTP/1.1\r\nHost: t\r\nX: " + b"x" * 40_000 + b"\r\n\r\n")
        head, _, answer = huge.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431")
        error = json.loads(answer)
        assert (error["type"], error["error"]["type"], error["request_id"]) == ("error", "invalid_request_error", None)
        other = server.raw(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nX: " + b"x" * 40_000 + b"\r\n\r\n")
        assert set(json.loads(other.partition(b"\r\n\r\n")[2])) == {"error"}
        garbage = server.raw(b"\x00\x01\r\n\r\n")
        assert garbage.startswith(b"HTTP/1.1 400")

    def test_host(self, server: LiveServer) -> None:
        with server.client(headers={"Host": "evil.example"}) as client:
            assert error_of(client.post(ROUTE, json=body())) == (403, "permission_error", "host_not_allowed")

    def test_routes_and_methods(self, client: httpx.Client) -> None:
        assert error_of(client.post("/v1/messages/batches", json={})) == (404, "not_found_error", "not_found")
        assert error_of(client.get(ROUTE)) == (405, "invalid_request_error", "method_not_allowed")
        assert set(client.post("/v1/messagesx", json={}).json()) == {"error"}

    def test_bodies(self, client: httpx.Client) -> None:
        json_type = {"Content-Type": "application/json"}
        for route in (ROUTE, COUNT):
            invalid = client.post(route, content=b"{", headers=json_type)
            assert error_of(invalid) == (400, "invalid_request_error", "invalid_json")
            large = client.post(route, content=b" " * (5 << 20), headers=json_type)
            assert error_of(large) == (413, "request_too_large", "request_too_large")
            other = client.post(route, content=b"x", headers={"Content-Type": "text/plain"})
            assert error_of(other) == (415, "invalid_request_error", "unsupported_media_type")

    def test_keys(self) -> None:
        with LiveServer(make_state(keys=KEYS)) as server, server.client() as client:
            assert error_of(client.post(ROUTE, json=body())) == (401, "authentication_error", "missing_api_key")
            wrong = client.post(ROUTE, json=body(), headers={"x-api-key": "no"})
            assert error_of(wrong) == (401, "authentication_error", "invalid_api_key")
            assert client.post(ROUTE, json=body(), headers={"x-api-key": KEYS[0]}).status_code == 200

    def test_gate(self) -> None:
        with LiveServer(make_state(max_num_seqs=1, max_queued_requests=1)) as server, server.client() as client:
            gate = server.gate()
            sockets = [server.connect() for _ in range(2)]
            for sock in sockets:
                sock.sendall(http_post(ROUTE, body()))
            server.until(lambda engine: len(engine.running) == 2)
            refused = client.post(ROUTE, content=b"not even JSON")
            assert error_of(refused) == (529, "overloaded_error", "server_overloaded")
            assert refused.headers["retry-after"] == "1"
            server.open(gate)
            for sock in sockets:
                assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
                sock.close()
            server.assert_quiet()

    def test_draining(self) -> None:
        with LiveServer(make_state()) as server, server.client() as client:
            server.call(lambda: setattr(server.state.lifecycle, "refusing", True))
            assert error_of(client.post(ROUTE, json=body())) == (503, "api_error", "server_draining")

    def test_too_many_at_once(self) -> None:
        with LiveServer(make_state(max_token_requests=1)) as server, server.client() as client:
            with server.connect() as sock:
                sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
                             b"Content-Length: 10\r\n\r\n")  # fmt: skip
                while server.call(lambda: server.state.intake.num_token_requests) < 1:
                    pass
                refused = client.post(COUNT, json=body())
            assert error_of(refused) == (429, "rate_limit_error", "too_many_token_requests")


def test_limits_of_answers_hold() -> None:
    with LiveServer(make_state(max_answer_tokens=10)) as small, small.client() as client:
        assert error_of(client.post(ROUTE, json=body(max_tokens=11))) == (400, "invalid_request_error", "invalid_value")
        assert client.post(ROUTE, json=body(max_tokens=10)).status_code == 200


def test_an_adapter_that_is_closed_to_a_key_is_not_there() -> None:
    state = make_state(keys=KEYS)
    yours = state.keys.find(KEYS[0].encode())
    assert yours is not None
    state.catalog._live = OneAdapter("closed", SimpleNamespace(allowed_keys=(yours.id,)))
    with LiveServer(state) as server, server.client() as client:
        for route in (ROUTE, COUNT):
            mine = client.post(route, json=body(model="closed"), headers={"x-api-key": KEYS[0]})
            other = client.post(route, json=body(model="closed"), headers={"x-api-key": KEYS[1]})
            assert mine.status_code == 200, mine.text
            assert error_of(other) == (404, "not_found_error", "model_not_found")


def test_a_failed_stream_ends_with_an_error_event(client: httpx.Client, server: LiveServer) -> None:
    server.script(fail_after=2, failure="numerical_error")
    response = client.post(ROUTE, json=body(stream=True))
    (name, error), names = events_of(response.content)[-1], [name for name, _ in events_of(response.content)]
    assert (name, error["error"]["type"], error["error"]["details"]["error_code"]) == (
        "error",
        "api_error",
        "numerical_error",
    )
    assert error["request_id"] == response.headers["request-id"]
    assert "message_stop" not in names
    server.script(fail_after=0, failure="queue_timeout")
    assert error_of(client.post(ROUTE, json=body(stream=True))) == (529, "overloaded_error", "queue_timeout")


def test_the_metrics_count_it_like_a_chat(client: httpx.Client, server: LiveServer) -> None:
    def counted() -> list[float]:
        sample = server.state.metrics.registry.get_sample_value
        names = ("guanaco_adapter_requests_total", "guanaco_adapter_generation_tokens_total")
        return [sample(name, {"adapter": PIRATE}) or 0.0 for name in names]

    requests, tokens = counted()
    assert client.post(ROUTE, json=body(model=PIRATE)).status_code == 200
    assert client.post(COUNT, json=body(model=PIRATE)).status_code == 200, "counting generates nothing"
    assert counted() == [requests + 1, tokens + 5]
