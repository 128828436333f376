"""The official client, synchronous and not, against the live server: each understands what the other sends."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from support.server.api_server import BASE, MAX_MODEL_LEN, PIRATE, WAIT, LiveServer, make_state
from support.server.fake_engine import reply_of

KEY = "sk-test"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[LiveServer]:
    with LiveServer(make_state(keys=(KEY,))) as live:
        yield live


@pytest.fixture(scope="module")
def client(shared: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=shared.url + "/v1", api_key=KEY, max_retries=0, timeout=WAIT) as made:
        yield made


def test_models(server: LiveServer, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, PIRATE, "terse"]
    assert client.models.retrieve(BASE).owned_by == "guanaco"
    assert client.models.retrieve(PIRATE).parent == BASE


def test_chat(server: LiveServer, client: OpenAI) -> None:
    answer = client.chat.completions.create(model=PIRATE, messages=MESSAGES, max_completion_tokens=15)
    assert answer.choices[0].message.content == reply_of(server.engine.requests[-1])[:15]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 15
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer._request_id


def test_chat_stream(server: LiveServer, client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE, messages=MESSAGES, max_tokens=30, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, finishes, usage = ["", ""], [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [reply_of(request)[:30] for request in server.engine.requests[-2:]]
    assert finishes == ["length", "length"]
    assert usage.completion_tokens == 60


def test_chat_stream_helper(server: LiveServer, client: OpenAI) -> None:
    with client.chat.completions.stream(model=BASE, messages=MESSAGES, stop="€") as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    text = reply_of(server.engine.requests[-1]).split("€")[0]
    assert final.choices[0].message.content == text
    assert events.count("content.delta") == len(text)
    assert "content.done" in events


def test_logprobs(server: LiveServer, client: OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    assert [len(entry.top_logprobs) for entry in content] == [3] * 4
    assert content[0].token == content[0].top_logprobs[0].token


def test_completions(server: LiveServer, client: OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt=["one", "two"], max_tokens=8, logprobs=1, echo=True)
    replies = [reply_of(request)[:8] for request in server.engine.requests[-2:]]
    assert [choice.text for choice in answer.choices] == ["one" + replies[0], "two" + replies[1]]
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    text = "".join(
        chunk.choices[0].text for chunk in client.completions.create(model=BASE, prompt="x", max_tokens=8, stream=True)
    )
    assert text == reply_of(server.engine.requests[-1])[:8]


def test_errors_are_the_clients_own_exceptions(server: LiveServer, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    assert not_found.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=MAX_MODEL_LEN)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model=BASE, messages=MESSAGES, functions=[{"name": "f"}])
    assert (tools.value.code, tools.value.param) == ("unsupported_parameter", "functions")
    assert "use tools" in tools.value.message
    with pytest.raises(openai.AuthenticationError), OpenAI(base_url=server.url + "/v1", api_key="no") as stranger:
        stranger.models.list()
    server.script(fail_after=0, failure="numerical_error")
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=BASE, messages=MESSAGES, stream=True)


def test_failure_in_the_middle_of_a_stream_raises(server: LiveServer, client: OpenAI) -> None:
    server.script(fail_after=5, failure="numerical_error")
    seen = []
    stream = client.chat.completions.create(model=BASE, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="not numbers") as failed:
        seen.extend(stream)
    assert failed.value.code == "numerical_error"


def test_the_client_waits_and_retries_when_told_to(server: LiveServer) -> None:
    """503 with Retry-After is what its own retries are made for."""
    server.engine.max_running = 0
    with OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=1, timeout=WAIT) as client:
        waits: list[float] = []

        def sleep(options: object, **kwargs: object) -> None:
            waits.append(1.0)
            server.engine.max_running = 10_000

        client._sleep_for_retry = sleep  # its wait is 2.5 s: not here
        answer = client.chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert len(waits) == 1


def test_closing_a_stream_ends_the_generation(server: LiveServer, client: OpenAI) -> None:
    server.script(step_seconds=0.02)
    aborted = len(server.engine.aborted)
    stream = client.chat.completions.create(model=BASE, messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    server.until(lambda engine: len(engine.aborted) == aborted + 1)


def test_async_client_many_at_once(server: LiveServer) -> None:
    async def one(client: AsyncOpenAI, index: int) -> None:
        messages = [{"role": "user", "content": f"number {index}"}]
        model = (BASE, PIRATE, "terse")[index % 3]
        stream = await client.chat.completions.create(model=model, messages=messages, max_tokens=20, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        ids = tuple(server.state.tokenizer.encode_chat(messages))
        (request,) = [r for r in server.engine.requests[before:] if r.prompt_token_ids == ids]
        assert text == reply_of(request)[:20]
        assert [lora.version[0] for lora in request.loras] == [[], ["a"], ["b"]][index % 3]

    async def all_of_them() -> None:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=WAIT) as client:
            await asyncio.gather(*(one(client, index) for index in range(40)))

    before = len(server.engine.requests)
    asyncio.run(all_of_them())


def test_cancelling_an_async_call_ends_the_generation(server: LiveServer) -> None:
    gate = server.gate()
    aborted = len(server.engine.aborted)

    async def work() -> None:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.chat.completions.create(model=BASE, messages=MESSAGES), 0.3)

    asyncio.run(work())
    server.until(lambda engine: len(engine.aborted) == aborted + 1)
    server.open(gate)
