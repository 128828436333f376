"""Clients that repeat what is refused: what each refusal leaves undone, and who is served meanwhile."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from guanaco.server.api.generation import body as body_module
from guanaco.server.api.generation import serving
from guanaco.server.api.generation.body import parse_object
from guanaco.server.api.generation.serving import SMALL_BODY_BYTES
from guanaco.server.api.http.fair_pool import FairPool, Lane
from support.server.api_server import BASE, WAIT, LiveServer, chat_body, make_state
from support.server.fake_engine import FakeEngine, FakeTokenizer

KEY = "sesame"
CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
LARGE = "x" * 90_000
MAX_BODY = 100_000


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kind of work was begun: parsing, a thread, the template and tokenizer, the engine."""
    seen: Counter[str] = Counter()

    def watch(owner: Any, name: str, kind: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[kind] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for name in ("check_structure", "from_json"):
        watch(body_module, name, "parsing")
    watch(FairPool, "run", "thread")
    for name in ("encode", "encode_chat"):
        watch(FakeTokenizer, name, "tokenizer")
    watch(FakeEngine, "submit_all", "engine")
    return seen


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state(keys=(KEY,), max_body_bytes=MAX_BODY, max_token_requests=1)) as live:
        yield live
        live.assert_quiet()


def ask(server: LiveServer, path: str, body: Any, **headers: str) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {KEY}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    with server.client() as client:
        given = {"content": body} if isinstance(body, bytes) else {"json": body}
        response = client.post(path, headers={"Content-Type": "application/json", **headers}, **given)
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize(
    ("path", "headers", "body", "refusal"),
    [
        (CHAT, {"Authorization": "Bearer wrong"}, chat_body(LARGE), (401, "invalid_api_key")),
        ("/v1/adapters", {}, chat_body(LARGE), (403, "admin_disabled")),
        ("/nope", {}, chat_body(LARGE), (404, "not_found")),
        ("/health", {}, chat_body(LARGE), (405, "method_not_allowed")),
        (CHAT, {}, chat_body("x" * MAX_BODY), (413, "request_too_large")),
        (CHAT, {"Content_Type": "text/plain"}, chat_body(LARGE), (415, "unsupported_media_type")),
        (CHAT, {"Content_Encoding": "gzip"}, chat_body(LARGE), (415, "unsupported_encoding")),
    ],
    ids=["401", "403", "404", "405", "413", "media type", "encoding"],
)
def test_a_refusal_by_the_head_costs_nothing_but_itself(
    path: str, headers: dict[str, str], body: Any, refusal: tuple[int, str], server: LiveServer, costs: Counter[str]
) -> None:
    for _ in range(3):
        assert ask(server, path, body, **headers) == refusal
    assert not costs
    assert server.state.intake.num_body_bytes == 0


@pytest.mark.parametrize(
    ("path", "refusal"), [(CHAT, (503, "server_overloaded")), (TOKENIZE, (429, "too_many_token_requests"))]
)
def test_a_refusal_for_want_of_room_costs_nothing_but_itself(
    path: str, refusal: tuple[int, str], server: LiveServer, costs: Counter[str]
) -> None:
    state = server.state
    with contextlib.ExitStack() as stack:
        if path == TOKENIZE:
            place = state.intake.token_request(None)
            server.call(place.__enter__)
            stack.callback(lambda: server.call(lambda: place.__exit__(None, None, None)))
        else:
            server.call(lambda: setattr(state.lifecycle, "num_admitted", state.max_admitted))
            stack.callback(lambda: server.call(lambda: setattr(state.lifecycle, "num_admitted", 0)))
        for _ in range(3):
            assert ask(server, path, {"model": BASE, "prompt": LARGE}) == refusal
        assert not costs


def test_what_ends_or_operates_passes_a_full_server() -> None:
    """Cancelling a response and draining are wanted most when the server is full; an operator's changes, too."""
    # 403: this server has no admin key; the request came as far as that.
    passes = {"/v1/responses/resp_x/cancel": 404, "/v1/adapters/x/rollback": 403, "/v1/load_lora_adapter": 403}
    with LiveServer(make_state()) as server, server.client() as client:
        lifecycle = server.state.lifecycle
        server.call(lambda: setattr(lifecycle, "num_admitted", server.state.max_admitted))
        assert client.post(CHAT, json=chat_body("x")).status_code == 503
        for path, status in passes.items():
            assert client.post(path, json={}).status_code == status, path
        server.call(lambda: setattr(lifecycle, "refusing", True))
        assert client.post("/v1/adapters/x/rollback", json={}).status_code == 503
        assert client.post("/v1/responses/resp_x/cancel").status_code == 404
        assert client.post("/v1/drain").status_code == 403
        server.call(lambda: setattr(lifecycle, "num_admitted", 0))


@pytest.mark.parametrize(
    ("body", "refusal", "cost"),
    [
        (b"{", (400, "invalid_json"), {"parsing": 2}),
        (b'{"a":' + b"[" * SMALL_BODY_BYTES, (400, "invalid_json"), {"parsing": 2, "thread": 1}),
        (b'{"a":"' + b",:" * 20_000 + b'","b":{' + b'"":1,' * 3, (400, "invalid_json"), {"parsing": 2, "thread": 1}),
        (b"[" + b"[]," * 40_000, (413, "request_too_large"), {}),
        (b"[" + b"{" * 40_000, (400, "invalid_json"), {"parsing": 1, "thread": 1}),
        (chat_body("x", temperature=9), (400, "invalid_value"), {"parsing": 2, "thread": 1}),
        (chat_body("x", lora=[{"id": 0}], mirostat=2), (400, "unsupported_parameter"), {"parsing": 2, "thread": 1}),
        (chat_body("x") | {"model": "nobody"}, (404, "model_not_found"), {"parsing": 2, "thread": 1}),
    ],
    ids=["no JSON", "large no JSON", "large no JSON either", "too large", "structure", "value", "field", "model"],
)
def test_a_refusal_by_the_body_ends_before_the_template_and_the_engine(
    body: Any, refusal: tuple[int, str], cost: dict[str, int], server: LiveServer, costs: Counter[str]
) -> None:
    assert ask(server, CHAT, body) == refusal
    assert costs == Counter(cost)


def test_a_small_chat_has_its_turn_among_large_ones_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one model and without keys, and all parsed. The large ones hold both threads; first come, first served,
    the chat would be the last of seven."""

    async def parsed_at_once(_pool: FairPool, _lane: Lane, body: bytes) -> dict[str, Any]:
        return parse_object(body)

    monkeypatch.setattr(serving, "parse", parsed_at_once)
    begun: list[str] = []
    may_end = threading.Semaphore(0)
    real = FakeTokenizer.encode_chat

    def slow(self: FakeTokenizer, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        is_large = len(messages[0]["content"]) > SMALL_BODY_BYTES
        begun.append("large" if is_large else "small")
        if is_large:
            assert may_end.acquire(timeout=WAIT)
        return real(self, messages, **options)

    monkeypatch.setattr(FakeTokenizer, "encode_chat", slow)
    statuses: list[int] = []
    with LiveServer(make_state()) as server:

        def chat(text: str) -> None:
            with server.client() as client:
                statuses.append(client.post(CHAT, json=chat_body(text, max_tokens=1)).status_code)

        def waiting() -> int:
            tenants = server.state.preparation._waiting.values()
            return sum(len(turns) for tenant in tenants for turns in tenant.topics.values())

        def start(text: str, num_waiting: int) -> threading.Thread:
            thread = threading.Thread(target=chat, args=(text,), daemon=True)
            thread.start()
            tick = threading.Event()
            for _ in range(int(WAIT / 0.005)):
                if server.call(waiting) == num_waiting and len(begun) >= min(2, len(threads) + 1):
                    break
                tick.wait(0.005)
            return thread

        threads: list[threading.Thread] = []
        for number in range(6):
            threads.append(start("x" * 20_000, max(0, number - 1)))
        assert begun == ["large", "large"]
        threads.append(start("hello", 5))
        for _ in range(6):
            may_end.release()
        for thread in threads:
            thread.join(WAIT)
    assert begun.index("small") <= 4
    assert sorted(statuses) == [200] + [400] * 6
