"""Endpoints: keys go to one origin and are shown nowhere, redirects are not followed, a pace is kept."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from guanaco.server.errors import CommandError
from guanaco.server.judging.endpoints import Endpoint, RequestRefused, origin_of, read_keys
from support.server.scripted_endpoint import Reply, ScriptedEndpoint, chat_answer, endless_endpoint

BODY = {"model": "m", "messages": []}


def ask(endpoint_url: str, **options: Any) -> Any:
    async def run() -> Any:
        async with Endpoint(endpoint_url, **options) as endpoint:
            return await endpoint.chat(BODY)

    return asyncio.run(run())


def test_keys_come_from_variables_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-one")
    (tmp_path / "key").write_text("sk-two\n")
    keys = read_keys(["https://api.example.com/v1=env:SOME_KEY", f"http://127.0.0.1:9=file:{tmp_path / 'key'}"])
    assert keys == {"https://api.example.com:443": "sk-one", "http://127.0.0.1:9": "sk-two"}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("https://a.example=sk-secret", "never stands there"),
        ("sk-secret", "never stands there"),
        ("https://a.example=env:NOT_SET_ANYWHERE", "holds no key"),
        ("https://a.example=file:/absent/key", "cannot be read"),
        ("a.example=env:HOME", "expected an address"),
    ],
)
def test_a_wrong_key_option_never_shows_a_key(option: str, words: str) -> None:
    with pytest.raises(CommandError, match=words) as raised:
        read_keys([option])
    assert "sk-secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["ftp://a", "http://user:word@a", "a.example", "http://a b", "http://a:99999", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(CommandError, match="expected an address"):
        origin_of(url, "--url")


def test_a_redirect_is_not_followed_and_its_target_never_sees_the_key() -> None:
    with ScriptedEndpoint(lambda *_: chat_answer("stolen")) as other:
        moved: Reply = (307, {"Location": f"{other.url}/v1/chat/completions"}, {})
        with (
            ScriptedEndpoint(lambda *_: moved) as first,
            pytest.raises(CommandError, match="answered 307: check the address"),
        ):
            ask(first.url, key="sk-secret")
        assert first.requests[0][1]["Authorization"] == "Bearer sk-secret"
        assert other.requests == []


def test_an_endpoints_own_words_are_told_without_the_key() -> None:
    told: Reply = (400, {}, {"error": {"message": "the key sk-secret has no model m"}})
    with ScriptedEndpoint(lambda *_: told) as endpoint, pytest.raises(RequestRefused) as raised:
        ask(endpoint.url, key="sk-secret")
    assert "the key (key) has no model m" in str(raised.value)


def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(CommandError, match=r"no server at http://127\.0\.0\.1:1 "):
        ask("http://127.0.0.1:1/v1")


def test_a_server_that_goes_away_ends_the_run() -> None:
    async def no_sleep(_: float) -> None:
        pass

    async def run() -> None:
        with ScriptedEndpoint(lambda *_: (200, {"Connection": "close"}, {"choices": []})) as scripted:
            endpoint = Endpoint(scripted.url, sleep=no_sleep)
            await endpoint.chat(BODY)
        with pytest.raises(CommandError, match="is gone: start it again, and run the same command"):
            await endpoint.chat(BODY)
        assert endpoint.usage.retries == 5

    asyncio.run(run())


def test_a_pace_is_kept() -> None:
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def run(url: str) -> None:
        async with Endpoint(url, per_minute=60, sleep=sleep) as endpoint:
            await asyncio.gather(*(endpoint.chat(BODY) for _ in range(4)))

    with ScriptedEndpoint(lambda *_: chat_answer("x")) as scripted:
        asyncio.run(run(scripted.url))
    assert [round(s) for s in slept] == [1, 2, 3]


def test_tokens_are_counted() -> None:
    async def run(url: str) -> Any:
        async with Endpoint(url) as endpoint:
            await endpoint.chat(BODY)
            await endpoint.chat(BODY)
            return endpoint.usage

    with ScriptedEndpoint(lambda *_: chat_answer("one two")) as scripted:
        usage = asyncio.run(run(scripted.url))
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (2, 20, 4)


def test_an_endpoint_does_not_show_its_key() -> None:
    assert "sk-secret" not in repr(Endpoint("http://127.0.0.1:9", "sk-secret"))


def test_half_a_surrogate_pair_in_an_answer_can_be_written() -> None:
    with ScriptedEndpoint(lambda *_: chat_answer("a\ud800b \U0001f600")) as server:
        answer, _ = ask(server.url)
    text = answer["choices"][0]["message"]["content"]
    assert text == "a?b \U0001f600"
    text.encode()


def test_an_answer_that_is_too_large_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server never ends it: whoever waits for all of it waits for ever."""
    monkeypatch.setattr("guanaco.server.judging.endpoints._MOST_BYTES", 1 << 16)
    with endless_endpoint() as url, pytest.raises(RequestRefused, match="answered with more than"):
        ask(url)
