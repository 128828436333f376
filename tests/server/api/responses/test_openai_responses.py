"""OpenAI's official client on /v1/responses against the live server: each understands what the other sends."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response

from support.server.api_server import BASE, PIRATE, WAIT, LiveServer, make_state
from support.server.fake_engine import ASSISTANT, END, SYSTEM, USER, reply_of

KEYS = ("sk-a", "sk-b")


@pytest.fixture(scope="module")
def shared() -> Iterator[LiveServer]:
    with LiveServer(make_state(keys=KEYS)) as live:
        yield live


def client_of(server: LiveServer, key: str) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=WAIT)


@pytest.fixture(scope="module")
def client(shared: LiveServer) -> Iterator[OpenAI]:
    with client_of(shared, KEYS[0]) as made:
        yield made


@pytest.fixture(scope="module")
def other(shared: LiveServer) -> Iterator[OpenAI]:
    with client_of(shared, KEYS[1]) as made:
        yield made


def test_create(server: LiveServer, client: OpenAI) -> None:
    response = client.responses.create(
        model=PIRATE, input="hello", instructions="be brief", max_output_tokens=15, metadata={"a": "b"}, temperature=0.5
    )
    request = server.engine.requests[-1]
    assert response.output_text == reply_of(request)[:15]
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.model, response.instructions, response.metadata) == (PIRATE, "be brief", {"a": "b"})
    assert (response.temperature, response.max_output_tokens, response.error) == (0.5, 15, None)
    assert response.usage.input_tokens == len(request.prompt_token_ids)
    assert (response.usage.output_tokens, response.usage.total_tokens - response.usage.input_tokens) == (15, 15)
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert request.params.temperature == 0.5


def test_what_is_sent_has_openais_own_types(server: LiveServer, client: OpenAI) -> None:
    """The client builds its models without validation; this validates."""
    raw = client.responses.with_raw_response.create(model=BASE, input="hello")
    response = Response.model_validate_json(raw.content, strict=True)
    assert response.status == "completed"
    assert response.output[0].content[0].text == reply_of(server.engine.requests[-1])


def test_stream(server: LiveServer, client: OpenAI) -> None:
    events = list(client.responses.create(model=BASE, input="hello", stream=True))
    text = reply_of(server.engine.requests[-1])
    kinds = [event.type for event in events]
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * len(text),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    final = events[-1].response
    assert (final.output_text, final.status, final.id) == (text, "completed", events[0].response.id)
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {final.output[0].id}
    assert (events[0].response.status, events[0].response.usage) == ("in_progress", None)
    assert client.responses.retrieve(final.id) == final


def test_stream_helper(server: LiveServer, client: OpenAI) -> None:
    with client.responses.stream(model=BASE, input="hello") as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == reply_of(server.engine.requests[-1])


def test_a_stream_that_reaches_its_limit_ends_incomplete(server: LiveServer, client: OpenAI) -> None:
    *_, done, last = client.responses.create(model=BASE, input="hello", max_output_tokens=4, stream=True)
    assert (done.type, done.item.status) == ("response.output_item.done", "incomplete")
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.usage.output_tokens == 4


def test_a_stream_that_fails_says_so_in_its_last_event(server: LiveServer, client: OpenAI) -> None:
    server.script(fail_after=3, failure="numerical_error")
    *_, last = client.responses.create(model=BASE, input="hello", stream=True)
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert "not numbers" in last.response.error.message
    assert client.responses.retrieve(last.response.id).status == "failed"
    server.script(fail_after=0, failure="numerical_error")
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model=BASE, input="hello", stream=True)


def test_going_on_from_a_response(server: LiveServer, client: OpenAI) -> None:
    first = client.responses.create(model=BASE, input="one", instructions="be brief")
    second = client.responses.create(model=PIRATE, input="two", previous_response_id=first.id)
    third = client.responses.create(
        model=BASE, input="three", previous_response_id=second.id, instructions="be kind", max_output_tokens=1
    )
    assert third.previous_response_id == second.id
    expected = [SYSTEM, *b"be kind", END]
    for said, answered in (("one", first.output_text), ("two", second.output_text)):
        expected += [USER, *said.encode(), END, ASSISTANT, *answered.encode(), END]
    assert list(server.engine.requests[-1].prompt_token_ids)[1:] == [*expected, USER, *b"three", END, ASSISTANT]
    items = client.responses.input_items.list(third.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant", "user", "assistant", "user"]
    assert items[1].id == first.output[0].id


def test_items_that_are_kept_may_be_named_by_id(server: LiveServer, client: OpenAI, other: OpenAI) -> None:
    """AI SDK's OpenAI provider names earlier answers so."""
    first = client.responses.create(model=BASE, input="one")
    asked = client.responses.input_items.list(first.id).data[0].id
    named = [{"type": "item_reference", "id": name} for name in (asked, first.output[0].id)]
    client.responses.create(model=BASE, input=[*named, {"role": "user", "content": "two"}], max_output_tokens=1)
    by_reference = server.engine.requests[-1].prompt_token_ids
    client.responses.create(model=BASE, input="two", previous_response_id=first.id, max_output_tokens=1)
    assert server.engine.requests[-1].prompt_token_ids == by_reference
    with pytest.raises(openai.BadRequestError, match="is kept"):
        other.responses.create(model=BASE, input=named)


def test_input_items_come_in_pages(server: LiveServer, client: OpenAI) -> None:
    messages = [{"role": "user", "content": str(i)} for i in range(7)]
    response = client.responses.create(model=BASE, input=messages, max_output_tokens=1)
    for order, texts in (("asc", "0123456"), ("desc", "6543210")):
        paged = list(client.responses.input_items.list(response.id, order=order, limit=3))
        assert "".join(item.content[0].text for item in paged) == texts
    page = client.responses.input_items.list(response.id, limit=7)
    assert (len(page.data), page.has_more, page.first_id) == (7, False, page.data[0].id)
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.responses.input_items.list(response.id, limit=101)


def test_a_response_can_be_forgotten(server: LiveServer, client: OpenAI) -> None:
    response = client.responses.create(model=BASE, input="hello", max_output_tokens=1)
    client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError) as gone:
            call(response.id)
        assert gone.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError, match="expired") as previous:
        client.responses.create(model=BASE, input="x", previous_response_id=response.id)
    assert (previous.value.code, previous.value.param) == ("previous_response_not_found", "previous_response_id")


def test_a_response_is_its_keys_alone(server: LiveServer, client: OpenAI, other: OpenAI) -> None:
    response = client.responses.create(model=BASE, input="secret", max_output_tokens=1)
    calls = (other.responses.retrieve, other.responses.delete, other.responses.cancel, other.responses.input_items.list)
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call(response.id)
    with pytest.raises(openai.BadRequestError):
        other.responses.create(model=BASE, input="x", previous_response_id=response.id)
    assert client.responses.retrieve(response.id) == response


def test_what_must_not_be_kept_is_not(server: LiveServer, client: OpenAI) -> None:
    kept = len(server.server.config.app.state.responses)
    for stream in (False, True):
        made = client.responses.create(model=BASE, input="x", store=False, max_output_tokens=1, stream=stream)
        response = list(made)[-1].response if stream else made
        assert response.store is False
        with pytest.raises(openai.NotFoundError, match="store: false"):
            client.responses.retrieve(response.id)
    assert len(server.server.config.app.state.responses) == kept


def test_a_running_response_is_seen_and_cancelled(server: LiveServer, client: OpenAI, other: OpenAI) -> None:
    server.script(step_seconds=0.01)
    aborted = len(server.engine.aborted)
    stream = client.responses.create(model=BASE, input="hello", stream=True)
    events = [next(stream) for _ in range(6)]
    response_id = events[0].response.id
    seen = client.responses.retrieve(response_id)
    assert seen.status == "in_progress"
    assert seen.output_text
    with pytest.raises(openai.NotFoundError):
        other.responses.cancel(response_id)
    cancelled = client.responses.cancel(response_id)
    assert (cancelled.status, cancelled.output[0].status) == ("cancelled", "incomplete")
    events += stream
    assert (events[-1].type, events[-1].response.status) == ("response.incomplete", "cancelled")
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == cancelled.output_text
    assert client.responses.cancel(response_id) == client.responses.retrieve(response_id) == cancelled
    server.until(lambda engine: len(engine.aborted) == aborted + 1)


def test_a_whole_answer_can_be_cancelled_from_elsewhere(server: LiveServer) -> None:
    gate = server.gate()

    async def work() -> Response:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key=KEYS[0], max_retries=0) as client:
            call = asyncio.ensure_future(client.responses.create(model=BASE, input="hello"))
            await asyncio.to_thread(server.until, lambda engine: len(engine.running) == 1)
            (response_id,) = server.server.config.app.state.responses._running
            await client.responses.cancel(response_id)
            return await call

    response = asyncio.run(work())
    server.open(gate)
    assert (response.status, response.output) == ("cancelled", [])


def test_a_client_that_leaves_a_stream_finds_what_had_come(server: LiveServer, client: OpenAI) -> None:
    server.script(step_seconds=0.01)
    aborted = len(server.engine.aborted)
    stream = client.responses.create(model=BASE, input="hello", stream=True)
    events = [next(stream) for _ in range(8)]
    stream.close()
    server.until(lambda engine: len(engine.aborted) == aborted + 1)
    server.assert_quiet()
    left = client.responses.retrieve(events[0].response.id)
    assert left.status == "cancelled"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert left.output_text.startswith(text)


def test_logprobs(server: LiveServer, client: OpenAI) -> None:
    fields = {"model": BASE, "input": "x", "max_output_tokens": 4, "top_logprobs": 2}
    include = ["message.output_text.logprobs"]
    response = client.responses.create(**fields, include=include)
    entries = response.output[0].content[0].logprobs
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 4
    events = list(client.responses.create(**fields, include=include, stream=True))
    streamed = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert client.responses.create(model=BASE, input="x", max_output_tokens=1).output[0].content[0].logprobs == []


def test_counting_the_input(server: LiveServer, client: OpenAI) -> None:
    first = client.responses.create(model=BASE, input="hello", max_output_tokens=3)
    fields = {"model": BASE, "input": "and?", "instructions": "be brief", "previous_response_id": first.id}
    counted = client.responses.input_tokens.count(**fields).input_tokens
    assert counted == client.responses.create(**fields, max_output_tokens=1).usage.input_tokens


def test_errors_are_the_clients_own_exceptions(server: LiveServer, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.responses.create(model="nobody", input="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_output_tokens") as long:
        client.responses.create(model=BASE, input="x", max_output_tokens=10**6)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "max_output_tokens")
    server.engine.max_running = 0
    with pytest.raises(openai.InternalServerError) as busy:
        client.responses.create(model=BASE, input="x", stream=True)
    server.engine.max_running = 10_000
    assert (busy.value.status_code, busy.value.code) == (503, "server_overloaded")
