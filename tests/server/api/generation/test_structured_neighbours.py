"""Structured output beside other requests: nobody waits for a grammar, and what breaks ends its own request."""

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.models.error_codes import ErrorCode
from guanaco.server.grammars.compiler import CompiledGrammar
from guanaco.server.grammars.matcher import GrammarMatcher
from guanaco.server.grammars.spec import Grammar
from support.grammars.requests import CHAT, PERSON, answer, chat, content, error_of, json_schema
from support.server.api_server import WAIT
from support.server.real_server import RealServer, make_real_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with make_real_server(tmp_path_factory.mktemp("structured")) as live:
        yield live


@pytest.fixture
def client(server: RealServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
    server.assert_quiet()


def test_neighbours_get_what_they_get_alone(client: httpx.Client, server: RealServer) -> None:
    """Requests with and without a demand, at once: each has the same answer as alone."""
    bodies = [
        chat(max_tokens=60, temperature=0),
        chat(max_tokens=60, seed=7),
        chat(response_format=json_schema(PERSON)),
        chat(response_format=json_schema(PERSON), seed=9, n=2),
        chat(guided_regex="[a-z]{40}"),
    ]
    alone = [[c["message"] for c in answer(client, body)] for body in bodies]
    with ThreadPoolExecutor(10) as pool:
        together = pool.map(lambda body: [c["message"] for c in answer(client, body)], bodies * 2)
    assert list(together) == alone * 2


def test_hostile_demands_disturb_nobody(client: httpx.Client, server: RealServer) -> None:
    """While the process chews on them, the loop answers and other demands are met."""
    rules = "\n".join(["start: r0", *(f'r{i}: "a" r{i + 1} | "b" r{i + 1}' for i in range(5000)), 'r5000: "x"'])
    hostile = [
        {"guided_grammar": rules},
        {"guided_json": {"enum": [f"value {i}" for i in range(30_000)]}},
        {"guided_json": {"type": "integer", "multipleOf": 10**9 + 7}},
        {"guided_regex": "(" * 1000 + "a" + ")" * 1000},
    ]
    expected = answer(client, chat(max_tokens=30, temperature=0))[0]["message"]
    with ThreadPoolExecutor(8) as pool:
        refused = [pool.submit(error_of, client, chat(**fields)) for fields in hostile * 2]
        others = [pool.submit(answer, client, chat(max_tokens=30, temperature=0)) for _ in range(8)]
        met = [pool.submit(answer, client, chat(guided_choice=[f"met {i}"])) for i in range(4)]
        assert {future.result()["code"] for future in refused} == {"invalid_grammar"}
        assert all(future.result()[0]["message"] == expected for future in others)
        assert [content(future.result()[0]) for future in met] == [f"met {i}" for i in range(4)]


def test_compiling_holds_no_thread_of_other_requests(
    client: httpx.Client, server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar that is being compiled: the loop, the health check and plain chats go on."""
    begun, go_on = threading.Event(), threading.Event()
    compile_it = server.state.grammars.compile

    def slow(grammar: Grammar) -> CompiledGrammar:
        begun.set()
        assert go_on.wait(WAIT)
        return compile_it(grammar)

    monkeypatch.setattr(server.state.grammars, "compile", slow)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(answer, client, chat(guided_choice=["x"])) for _ in range(2)]
        assert begun.wait(WAIT)
        assert client.get("/health/live").status_code == 200
        assert answer(client, chat(max_tokens=5))
        go_on.set()
        assert [content(future.result()[0]) for future in waiting] == ["x", "x"]


def test_a_client_that_leaves_frees_its_matcher(
    client: httpx.Client, server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    matchers: list[weakref.ref[GrammarMatcher]] = []
    original = CompiledGrammar.matcher

    def watched(self: CompiledGrammar, ends: Any) -> GrammarMatcher:
        made = original(self, ends)
        matchers.append(weakref.ref(made))
        return made

    monkeypatch.setattr(CompiledGrammar, "matcher", watched)
    body = chat(guided_regex="[a-z]+", ignore_eos=True, max_tokens=400, stream=True)
    with client.stream("POST", CHAT, json=body) as response:
        assert next(response.iter_bytes())
    server.assert_quiet()
    assert len(matchers) == 1

    def is_freed() -> bool:
        gc.collect()
        return matchers[0]() is None

    server.wait(is_freed)


def test_a_grammar_that_breaks_down_ends_its_request_alone(
    client: httpx.Client, server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GrammarMatcher.accept

    def accept(self: GrammarMatcher, token_id: int) -> None:
        original(self, token_id)
        if getattr(self, "breaks", False):
            self.error = ErrorCode.GRAMMAR_TOO_COMPLEX

    monkeypatch.setattr(GrammarMatcher, "accept", accept)
    monkeypatch.setattr(GrammarMatcher, "breaks", True, raising=False)
    error = error_of(client, chat(guided_choice=["broken"]))
    assert (error["code"], error["type"]) == ("grammar_too_complex", "invalid_request_error")
    streamed = client.post(CHAT, json=chat(guided_choice=["broken"], stream=True))
    assert "grammar_too_complex" in streamed.text
    monkeypatch.setattr(GrammarMatcher, "breaks", False)
    assert content(answer(client, chat(guided_choice=["whole"]))[0]) == "whole"


def test_waiting_for_the_compiler_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a flood of demands a request is refused as it is behind a full queue."""
    go_on = threading.Event()
    with make_real_server(tmp_path, queue_timeout=0.2) as server, server.client() as client:
        compile_it = server.state.grammars.compile

        def slow(grammar: Grammar) -> CompiledGrammar:
            assert go_on.wait(WAIT)
            return compile_it(grammar)

        monkeypatch.setattr(server.state.grammars, "compile", slow)
        error = error_of(client, chat(guided_choice=["x"]), status=503)
        assert error["code"] == "server_overloaded"
        go_on.set()
        server.assert_quiet()
