"""/v1/responses over HTTP: what the input may be, what is refused by name, and that a chat's rules hold."""

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from guanaco.server.api.generation.ignored import HEADER
from guanaco.server.api.generation.logprobs import chat_logprobs
from guanaco.server.api.generation.protocol import ChatBody
from guanaco.server.api.responses import answer
from guanaco.server.api.responses.protocol import RESPONSE_FIELDS
from guanaco.server.api.values.unsupported import REFUSED
from support.server.api_server import BASE, PIRATE, LiveServer, http_post, make_state
from support.server.fake_engine import ASSISTANT, BOS, END, SYSTEM, USER
from support.server.one_adapter import OneAdapter

ROUTE, COUNT = "/v1/responses", "/v1/responses/input_tokens"
KEYS = ("sk-a", "sk-b")


def body(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": BASE, "input": content, "max_output_tokens": 3, **fields}


def test_the_input_goes_through_the_template(client: httpx.Client, server: LiveServer) -> None:
    said = {"type": "output_text", "text": "A", "annotations": []}
    items = [
        {"role": "developer", "content": "so"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in ("one", "two")]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [said]},
        {"role": "user", "content": "🦙"},
    ]
    response = client.post(ROUTE, json=body(items, instructions="be kind"))
    assert response.status_code == 200, response.text
    assert HEADER not in response.headers
    expected = [BOS, SYSTEM, *b"be kind\nso", END, USER, *b"one\ntwo", END, ASSISTANT, *b"A", END]
    expected += [USER, *"🦙".encode(), END, ASSISTANT]
    assert list(server.engine.requests[-1].prompt_token_ids) == expected
    kept = client.get(f"{ROUTE}/{response.json()['id']}/input_items?order=asc").json()["data"]
    assert [item["content"][0]["type"] for item in kept] == ["input_text", "input_text", "output_text", "input_text"]
    assert kept[2]["id"] == "msg_1"


def test_every_sampling_field_reaches_the_engine(client: httpx.Client, server: LiveServer) -> None:
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "seed": 3, "min_p": 0.125, "repetition_penalty": 1.5}
    assert client.post(ROUTE, json=body(**fields)).status_code == 200
    params = server.engine.requests[-1].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.max_tokens == 3


def test_vllms_fields_of_sampling_reach_the_engine(client: httpx.Client, server: LiveServer) -> None:
    """guidellm sends ignore_eos, and `stop` as null."""
    same = {"ignore_eos": True, "min_tokens": 2, "skip_special_tokens": False, "presence_penalty": 0.5}
    fields = {**same, "stop": ["zz"], "stop_token_ids": [5], "logit_bias": {"7": 1.5}, "bad_words": ["q"]}
    assert client.post(ROUTE, json=body(**fields)).status_code == 200
    params = server.engine.requests[-1].params
    assert {name: getattr(params, name) for name in same} == same
    assert params.stop_strings == ("zz",)
    assert 5 in params.stop_token_ids
    assert params.logit_bias == ((7, 1.5),)
    assert params.bad_words
    assert client.post(ROUTE, json=body(stop=None)).status_code == 200
    refused = client.post(ROUTE, json=body(stop_token_ids=["x"]))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stop_token_ids")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"input": [{"type": "item_reference", "id": []}]}, "input[0].id"),
        ({"input": [{"type": "file_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 513}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"include": ["nothing"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "video"}}}, "text.format"),
        ({"previous_response_id": "resp_nobody"}, "previous_response_id"),
        ({"adapters": [{"name": "nobody"}]}, "adapters[0].name"),
        ({"tools": [{"type": "function", "name": "f", "more": 2**64}]}, "tools"),
        ({"text": {"format": {"type": "text", "more": -(2**64)}}}, "text.format"),
        ({"max_tool_calls": 10**30}, "max_tool_calls"),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    good = body()
    response = client.post(ROUTE, json={name: value for name, value in {**good, **change}.items() if value is not None})
    error = response.json()["error"]
    assert response.status_code == (404 if "adapters" in change else 400)
    assert error["param"].startswith(param)
    assert param in error["message"]


def test_each_refused_field_is_refused_by_name(client: httpx.Client) -> None:
    wrong = []
    for name in RESPONSE_FIELDS.refused:
        for route in (ROUTE, COUNT):
            response = client.post(route, json={**body(), name: {"x": ["asks for something"]}})
            error = response.json()["error"]
            refused = (response.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
            if not refused or any(
                text not in error["message"] for text in (name, RESPONSE_FIELDS.instead.get(name, ""))
            ):
                wrong.append((route, name, response.text))
    assert not wrong


def test_no_field_of_chat_is_dropped_silently() -> None:
    """A field that chat has is this route's own, refused, or on the list of those that change nothing."""
    lists = RESPONSE_FIELDS.own | RESPONSE_FIELDS.refused.keys() | RESPONSE_FIELDS.harmless
    assert (ChatBody.model_fields.keys() | REFUSED.keys()) - lists == {"stream_options"}
    assert not RESPONSE_FIELDS.own & RESPONSE_FIELDS.refused.keys()
    assert not RESPONSE_FIELDS.refused.keys() & RESPONSE_FIELDS.harmless


def test_what_asks_for_nothing_or_changes_nothing_passes_unnamed(client: httpx.Client) -> None:
    neutral = {name: values[0] for name, values in RESPONSE_FIELDS.refused.items() if values}
    nulls = dict.fromkeys(RESPONSE_FIELDS.refused.keys() - neutral.keys())
    harmless = dict.fromkeys(RESPONSE_FIELDS.harmless, "x")
    text = {"text": {"format": {"type": "text"}, "verbosity": "low"}, "reasoning": {"effort": None, "summary": None}}
    for extra in (neutral, nulls, harmless, text, {"background": False, "include": ["reasoning.encrypted_content"]}):
        response = client.post(ROUTE, json={**body(), **extra})
        assert response.status_code == 200, response.text
        assert HEADER not in response.headers


def test_what_is_ignored_is_named(client: httpx.Client) -> None:
    items = [{"role": "user", "mood": 1, "content": [{"type": "input_text", "text": "x", "zoom": 2}]}]
    response = client.post(ROUTE, json=body(items, no_such_field=1))
    assert response.headers[HEADER] == "no_such_field, input.mood, input.content.zoom"


def test_a_stream_is_not_read_again(client: httpx.Client) -> None:
    made = client.post(ROUTE, json=body()).json()["id"]
    refused = client.get(f"{ROUTE}/{made}?stream=true")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")
    assert client.get(f"{ROUTE}/{made}?stream=false&include=x").status_code == 200


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=%D9%A1", "order=up", "after=nobody"])
def test_bad_pages_are_refused(client: httpx.Client, query: str) -> None:
    made = client.post(ROUTE, json=body()).json()["id"]
    refused = client.get(f"{ROUTE}/{made}/input_items?{query}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, query.partition("=")[0])


def test_limits_of_answers_hold() -> None:
    with LiveServer(make_state(max_answer_tokens=10)) as small, small.client() as client:
        refused = client.post(ROUTE, json=body(max_output_tokens=11))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_output_tokens")
        assert client.post(ROUTE, json=body(max_output_tokens=10)).status_code == 200
        large = client.post(ROUTE, content=b" " * (5 << 20), headers={"Content-Type": "application/json"})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")


def test_the_settings_bound_the_store() -> None:
    with LiveServer(make_state(max_responses_per_key=2)) as small, small.client() as client:
        ids = [client.post(ROUTE, json=body()).json()["id"] for _ in range(3)]
        assert [client.get(f"{ROUTE}/{made}").status_code for made in ids] == [404, 200, 200]
    with LiveServer(make_state(response_ttl=0)) as none, none.client() as client:
        made = client.post(ROUTE, json=body(store=True)).json()
        assert (made["store"], client.get(f"{ROUTE}/{made['id']}").status_code) == (False, 404)


def test_a_full_queue_refuses_before_the_body_is_read() -> None:
    with LiveServer(make_state(max_num_seqs=1, max_queued_requests=1)) as server, server.client() as client:
        gate = server.gate()
        sockets = [server.connect() for _ in range(2)]
        for sock in sockets:
            sock.sendall(http_post(ROUTE, body()))
        server.until(lambda engine: len(engine.running) == 2)
        refused = client.post(ROUTE, content=b"not even JSON")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
        server.open(gate)
        for sock in sockets:
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
            sock.close()
        server.assert_quiet()


def test_an_adapter_that_is_closed_to_a_key_is_not_there() -> None:
    state = make_state(keys=KEYS)
    yours = state.keys.find(KEYS[0].encode())
    assert yours is not None
    state.catalog._live = OneAdapter("closed", SimpleNamespace(allowed_keys=(yours.id,)))
    with LiveServer(state) as server, server.client() as client:
        for route in (ROUTE, COUNT):
            mine, other = (client.post(route, json=body(model="closed"), headers={"x-api-key": key}) for key in KEYS)
            assert mine.status_code == 200, mine.text
            assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


def test_the_metrics_and_the_log_count_it_like_a_chat(
    client: httpx.Client, server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    def counted() -> list[float]:
        sample = server.state.metrics.registry.get_sample_value
        names = ("guanaco_adapter_requests_total", "guanaco_adapter_generation_tokens_total")
        return [sample(name, {"adapter": PIRATE}) or 0.0 for name in names]

    requests, tokens = counted()
    with caplog.at_level("INFO", logger="guanaco.access"):
        made = client.post(ROUTE, json=body(model=PIRATE)).json()["id"]
        client.get(f"{ROUTE}/{made}")
        server.assert_quiet()
    assert counted() == [requests + 1, tokens + 3]
    created, read = (record.fields for record in caplog.records if record.name == "guanaco.access")  # type: ignore[attr-defined]
    assert (created["route"], created["model"], created["completion_tokens"]) == (ROUTE, PIRATE, 3)
    assert read["route"] == ROUTE + "/{response_id}"
    assert made not in json.dumps([created, read]), "an id is as good as a key"


def test_log_probabilities_are_made_once_and_not_kept_for_later_responses(
    server: LiveServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last events, which repeat them, are written on the event loop; a later response parses the kept items."""
    made = []

    def counted(tokenizer: Any, logprobs: Any) -> Any:
        made.extend(logprobs)
        return chat_logprobs(tokenizer, logprobs)

    monkeypatch.setattr(answer, "chat_logprobs", counted)
    include = {"include": ["message.output_text.logprobs"], "top_logprobs": 3}
    raw = client.post(ROUTE, json={"model": BASE, "input": "x", "max_output_tokens": 9, "stream": True, **include})
    final = json.loads(raw.text.rpartition("data: ")[2])["response"]
    entries = final["output"][0]["content"][0]["logprobs"]
    assert (len(entries), len(made)) == (9, 9)
    assert client.get(f"{ROUTE}/{final['id']}").json()["output"][0]["content"][0]["logprobs"] == entries
    again = {"model": BASE, "input": "y", "max_output_tokens": 1, "previous_response_id": final["id"]}
    later = client.post(ROUTE, json=again).json()
    items = client.get(f"{ROUTE}/{later['id']}/input_items?order=asc").json()["data"]
    assert [item["role"] for item in items] == ["user", "assistant", "user"]
    assert items[1]["content"][0] == {**final["output"][0]["content"][0], "logprobs": []}
