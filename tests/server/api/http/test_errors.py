"""Whatever comes in: the right status, OpenAI's envelope, the field's name, and nothing of the input."""

import http.client
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.server.api_server import BASE, WAIT, LiveServer, chat_body
from support.server.bad_bodies import ANY, GOOD, cases

ROUTES = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
# No path, address, traceback or name of a Python type may get out (reliability.md 5, S9).
LEAKS = re.compile(r"0x[0-9a-f]{4}|/usr/|/work/|/home/|/tmp|Traceback|\.py\b|Error:|Exception|object at|<class")


class Connection:
    """One kept-alive connection: thousands of requests would otherwise be thousands of connections."""

    def __init__(self, server: LiveServer) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        self._http.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = self._http.getresponse()
        data = response.read()
        return response.status, json.loads(data) if data.startswith(b"{") else {}


def check_envelope(answer: dict[str, Any]) -> dict[str, Any]:
    assert set(answer) == {"error"}
    error: dict[str, Any] = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.fullmatch(r"[\x20-\x7e]{1,300}", error["message"]), error
    assert re.fullmatch("[a-z_]+", error["code"])
    assert error["type"] in ("invalid_request_error", "server_error")
    assert not LEAKS.search(json.dumps(answer)), answer
    return error


@pytest.mark.parametrize("route", ROUTES)
def test_corpus_of_bad_bodies(server: LiveServer, route: str) -> None:
    connection = Connection(server)
    num_cases, wrong, num_before = 0, [], len(server.engine.requests)
    for name, body, expected_status, expected_param in cases(route):
        status, answer = connection.post(ROUTES[route], body)
        num_cases += 1
        if status != expected_status:
            wrong.append((name, status, answer))
            continue
        error = check_envelope(answer)
        param = error["param"]
        if expected_param is not ANY and (param is None or re.split(r"[.\[]", param)[0] != expected_param):
            wrong.append((name, param, error["message"]))
    assert not wrong
    assert num_cases >= 340
    assert len(server.engine.requests) == num_before, "some of them got through to the engine"
    assert connection.post(ROUTES[route], json.dumps({**GOOD[route], "max_tokens": 1}).encode())[0] == 200


def test_param_points_into_the_body(server: LiveServer) -> None:
    connection = Connection(server)
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": 5}]
    _, answer = connection.post(ROUTES["chat"], json.dumps({"model": BASE, "messages": messages}).encode())
    assert answer["error"]["param"] == "messages[1].content"
    body = chat_body(stream=True, stream_options={"include_usage": 1})
    _, answer = connection.post(ROUTES["chat"], json.dumps(body).encode())
    assert answer["error"]["param"] == "stream_options.include_usage"


CANARY = "kanari9f3a"


@pytest.mark.parametrize(
    "body",
    [
        {"model": CANARY, "messages": [{"role": "user", "content": "x"}]},
        {"model": BASE, "messages": [{"role": CANARY, "content": "x"}]},
        {"model": BASE, "messages": [{"role": "user", "content": [{"type": CANARY}]}]},
        {"model": BASE, "messages": [{"role": "assistant", "content": CANARY}]},
        {"model": BASE, "messages": [{"role": "user", "content": CANARY}], "temperature": CANARY},
        {"model": BASE, "messages": [{"role": "user", "content": CANARY}], "logit_bias": {CANARY: 1}},
        {"model": BASE, "messages": [{"role": "user", "content": CANARY}], "stop": {CANARY: 1}},
        {"model": BASE, "messages": [{"role": "user", "content": CANARY}], "response_format": {CANARY: 1}},
        {"model": BASE, "messages": [{"role": "user", "content": CANARY, CANARY: 1}], "n": {CANARY: 1}},
        {"model": BASE, "messages": [{"role": "user", "content": CANARY}], "stream_options": {CANARY: CANARY}},
        {"model": BASE, "messages": {CANARY: CANARY}},
    ],
)
def test_errors_never_hold_the_input(server: LiveServer, body: dict) -> None:
    with server.client() as client:
        response = client.post(ROUTES["chat"], json=body)
        broken = client.post(
            ROUTES["chat"], content=json.dumps(body)[:-1], headers={"Content-Type": "application/json"}
        )
        route = client.post(f"/{CANARY}", json=body)
    for answer in (response, broken, route):
        assert 400 <= answer.status_code < 500
        assert CANARY not in answer.text
        assert CANARY not in str(answer.headers)
        check_envelope(answer.json())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "application/jsonx"}, 415),
        ({"Content-Type": "application/json; charset=utf-16"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Encoding": "br"}, 415),
        ({"Content-Encoding": "deflate, gzip"}, 415),
        ({"Content-Type": "application/json; charset=UTF-8"}, 200),
        ({"Content-Type": "Application/JSON"}, 200),
        ({"Content-Encoding": "identity"}, 200),
    ],
)
def test_content_headers(server: LiveServer, headers: dict[str, str], status: int) -> None:
    body = json.dumps(chat_body(max_tokens=1)).encode()
    got, answer = Connection(server).post(ROUTES["chat"], body, **headers)
    assert got == status
    if status != 200:
        check_envelope(answer)


def test_body_limit_counts_what_is_not_announced(server: LiveServer) -> None:
    def chunks(num_bytes: int) -> Iterator[bytes]:
        filling = num_bytes - len(json.dumps(chat_body("")))
        whole = json.dumps(chat_body("x" * filling)).encode()
        for at in range(0, len(whole), 65536):
            yield whole[at : at + 65536]

    limit = server.state.settings.max_body_bytes
    headers = {"Content-Type": "application/json"}
    with server.client() as client:
        at_limit = client.post(ROUTES["chat"], content=chunks(limit), headers=headers)
        assert at_limit.json()["error"]["code"] == "context_length_exceeded", "read to its end"
        assert client.post(ROUTES["chat"], content=chunks(limit + 1), headers=headers).status_code == 413
        assert client.post(ROUTES["chat"], content=b"x" * (limit + 1), headers=headers).status_code == 413
        assert client.get("/version").status_code == 200, "the connection lives on"


def test_unforeseen_error_is_a_500_without_details(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    server.script(raise_on_submit=RuntimeError("SECRET /usr/lib/x.py"))
    caplog.set_level("DEBUG")
    with server.client() as client:
        for streaming in (False, True):
            response = client.post(ROUTES["chat"], json=chat_body(stream=streaming))
            assert response.status_code == 500
            assert check_envelope(response.json())["code"] == "internal_error"
    (first, *_) = [record for record in caplog.records if record.name == "guanaco.api"]
    assert first.fields["request_id"]
    assert first.exc_info[0] is RuntimeError


def test_engine_that_is_gone(server: LiveServer) -> None:
    server.engine.draining = True
    try:
        with server.client() as client:
            response = client.post(ROUTES["completions"], json={"model": BASE, "prompt": "x"})
    finally:
        server.engine.draining = False
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert response.json()["error"]["code"] == "server_draining"


# Bodies from a grammar: right and wrong values for the fields that exist, in any combination, and plain nonsense.
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
_anything = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]),
            "content": _anything | st.text(),
        }
    ),
    max_size=3,
)
_FIELDS = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "best_of", "seed", "stop", "echo"),
    *("stop_token_ids", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs"),
    *("top_logprobs", "stream", "stream_options", "tools", "response_format", "user", "cache_salt", "suffix", "x"),
)
_bodies = st.builds(
    lambda base, extra: {**base, **extra},
    st.fixed_dictionaries(
        {
            "model": st.sampled_from([BASE, "pirate", "nobody"]),
            # Often right, so that what is wrong elsewhere is reached, and the engine too.
            "messages": st.just([{"role": "user", "content": "hi"}]) | _messages,
            "prompt": st.just("hi") | _anything,
        }
    ),
    st.just({}) | st.dictionaries(st.sampled_from(_FIELDS), _anything | st.integers(0, 9), max_size=4),
)


@pytest.mark.timeout(1800)  # the full count
def test_generated_bodies_never_break_the_server(server: LiveServer, proof_count: Callable[[int, int], int]) -> None:
    connection = Connection(server)
    counts: dict[int, int] = {}

    @settings(
        max_examples=proof_count(400, 20_000),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_bodies, st.sampled_from(sorted(ROUTES.values())), st.data())
    def check(body: dict, path: str, data: st.DataObject) -> None:
        other = "prompt" if path == ROUTES["chat"] else "messages"  # refused there, whatever else is right
        raw = json.dumps({k: v for k, v in body.items() if k != other}).encode("utf-8", "surrogatepass")
        if data.draw(st.integers(0, 9)) == 0 and raw:  # one in ten has a byte changed
            at = data.draw(st.integers(0, len(raw) - 1))
            raw = raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
        status, answer = connection.post(path, raw)
        counts[status] = counts.get(status, 0) + 1
        assert status in (200, 400, 404), answer
        if status != 200:
            check_envelope(answer)

    check()
    assert connection.post(ROUTES["chat"], json.dumps(chat_body(max_tokens=1)).encode())[0] == 200
    assert counts[400] > 50
    assert counts[200] > 5, f"the grammar must reach the engine too: {counts}"
