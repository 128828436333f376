"""Anthropic's official client, synchronous and not, against the live server: each understands what the other sends."""

import asyncio
from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from support.server.api_server import BASE, PIRATE, PIRATE_VERSION, WAIT, LiveServer, make_state
from support.server.fake_engine import reply_of

KEY = "sk-test"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[LiveServer]:
    with LiveServer(make_state(keys=(KEY,))) as live:
        yield live


@pytest.fixture(scope="module")
def client(shared: LiveServer) -> Iterator[Anthropic]:
    with Anthropic(base_url=shared.url, api_key=KEY, max_retries=0, timeout=WAIT) as made:
        yield made


def test_create(server: LiveServer, client: Anthropic) -> None:
    message = client.messages.create(
        model=PIRATE, max_tokens=15, messages=MESSAGES, system="be brief", metadata={"user_id": "ann"}
    )
    request = server.engine.requests[-1]
    assert [(block.type, block.text) for block in message.content] == [("text", reply_of(request)[:15])]
    assert (message.type, message.role, message.model) == ("message", "assistant", PIRATE)
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (len(request.prompt_token_ids), 15)
    assert message.id.startswith("msg_")
    assert message._request_id
    assert [lora.version for lora in request.loras] == [PIRATE_VERSION]


def test_stream_helper(server: LiveServer, client: Anthropic) -> None:
    with client.messages.stream(model=BASE, max_tokens=2000, messages=MESSAGES, stop_sequences=["€"]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    text = reply_of(server.engine.requests[-1]).split("€")[0]
    assert final.content[0].text == text
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "€")
    assert final.usage.output_tokens >= len(text)
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds.count("text") == len(text)
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_raw_stream(server: LiveServer, client: Anthropic) -> None:
    events = list(client.messages.create(model=BASE, max_tokens=8, messages=MESSAGES, stream=True))
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == reply_of(server.engine.requests[-1])[:8]
    (delta,) = [event for event in events if event.type == "message_delta"]
    assert (delta.delta.stop_reason, delta.usage.output_tokens) == ("max_tokens", 8)


def test_count_tokens_is_what_create_counts(server: LiveServer, client: Anthropic) -> None:
    fields = {"model": BASE, "messages": MESSAGES, "system": "be brief"}
    counted = client.messages.count_tokens(**fields).input_tokens
    assert counted == client.messages.create(max_tokens=1, **fields).usage.input_tokens


def test_cached_tokens_are_counted_apart(server: LiveServer, client: Anthropic) -> None:
    server.script(cached_tokens=3)
    with client.messages.stream(model=BASE, max_tokens=2, messages=MESSAGES) as stream:
        streamed = stream.get_final_message().usage
    whole = client.messages.create(model=BASE, max_tokens=2, messages=MESSAGES).usage
    prompt = len(server.engine.requests[-1].prompt_token_ids)
    for usage in (streamed, whole):
        assert (usage.input_tokens, usage.cache_read_input_tokens) == (prompt - 3, 3)


def test_errors_are_the_clients_own_exceptions(server: LiveServer, client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as not_found:
        client.messages.create(model="nobody", max_tokens=5, messages=MESSAGES)
    assert (not_found.value.type, not_found.value.error_code) == ("not_found_error", "model_not_found")
    assert not_found.value.request_id == not_found.value.body["request_id"]
    with pytest.raises(anthropic.BadRequestError, match="max_tokens") as bad:
        client.messages.create(model=BASE, max_tokens=0, messages=MESSAGES)
    assert bad.value.type == "invalid_request_error"
    with Anthropic(base_url=server.url, api_key="no", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError) as unknown:
            stranger.messages.create(model=BASE, max_tokens=5, messages=MESSAGES)
        assert (unknown.value.type, unknown.value.error_code) == ("authentication_error", "invalid_api_key")
    server.script(fail_after=0, failure="numerical_error")
    with pytest.raises(anthropic.InternalServerError) as failed:
        client.messages.create(model=BASE, max_tokens=5, messages=MESSAGES, stream=True)
    assert failed.value.type == "api_error"


def test_an_overloaded_server_is_what_the_client_calls_so(server: LiveServer, client: Anthropic) -> None:
    server.engine.max_running = 0
    with pytest.raises(anthropic.OverloadedError) as busy:
        client.messages.create(model=BASE, max_tokens=5, messages=MESSAGES)
    server.engine.max_running = 10_000
    assert (busy.value.status_code, busy.value.type) == (529, "overloaded_error")
    assert busy.value.response.headers["retry-after"] == "3"


def test_failure_in_the_middle_of_a_stream_raises(server: LiveServer, client: Anthropic) -> None:
    server.script(fail_after=5, failure="numerical_error")
    with (
        client.messages.stream(model=BASE, max_tokens=50, messages=MESSAGES) as stream,
        pytest.raises(anthropic.APIStatusError, match="not numbers") as failed,
    ):
        stream.until_done()
    assert (failed.value.type, failed.value.error_code) == ("api_error", "numerical_error")


def test_closing_a_stream_ends_the_generation(server: LiveServer, client: Anthropic) -> None:
    server.script(step_seconds=0.02)
    aborted = len(server.engine.aborted)
    with client.messages.stream(model=BASE, max_tokens=4000, messages=MESSAGES) as stream:
        next(stream.text_stream)
    server.until(lambda engine: len(engine.aborted) == aborted + 1)


def test_cancelling_an_async_call_ends_the_generation(server: LiveServer) -> None:
    gate = server.gate()
    aborted = len(server.engine.aborted)

    async def work() -> None:
        async with AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
            call = asyncio.ensure_future(client.messages.create(model=BASE, max_tokens=5, messages=MESSAGES))
            await asyncio.to_thread(server.until, lambda engine: len(engine.running) == 1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(work())
    server.until(lambda engine: len(engine.aborted) == aborted + 1)
    server.open(gate)


WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
ASKED = {"model": BASE, "max_tokens": 1000, "messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER]}


def test_a_tool_is_used(server: LiveServer, client: Anthropic) -> None:
    server.script(reply="I look. " + CALL)
    message = client.messages.create(**ASKED)
    text, call = message.content
    assert (text.type, text.text) == ("text", "I look.")
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Zürich"})
    assert (message.stop_reason, call.id.startswith("toolu_")) == ("tool_use", True)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    messages = [*ASKED["messages"], {"role": "assistant", "content": message.content}]
    messages.append({"role": "user", "content": [result, {"type": "text", "text": "And?"}]})
    server.script(reply="It rains.")
    last = client.messages.create(**{**ASKED, "messages": messages})
    assert (last.content[0].text, last.stop_reason) == ("It rains.", "end_turn")
    prompt = server.state.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert "Zürich" in prompt
    assert prompt.index("rain") < prompt.index("And?")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("-123456789012345678901234567890", -123456789012345678901234567890),  # more than 64 bits
        (r'"\\ud800 \ud800 \ud83e\udd99 \udd99"', "\\ud800 \ufffd 🦙 \ufffd"),  # halves of surrogate pairs
        ("1e999", None),  # beyond a float64
    ],
    ids=("integer", "surrogates", "infinite"),
)
def test_arguments_that_json_of_ours_cant_hold(
    server: LiveServer, client: Anthropic, written: str, value: object
) -> None:
    server.script(reply=CALL.replace('"Zürich"', written))
    expected = {} if value is None else {"city": value}
    assert client.messages.create(**ASKED).content[0].input == expected
    events = list(client.messages.create(**ASKED, stream=True))
    assert events[-1].type == "message_stop"


def test_tools_in_a_stream(server: LiveServer, client: Anthropic) -> None:
    server.script(reply="I look.\n" + CALL + "\n" + CALL.replace("Zürich", "Basel"))
    with client.messages.stream(**ASKED) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in final.content[1:]] == [{"city": "Zürich"}, {"city": "Basel"}]
    assert final.content[0].text == "I look."
    assert final.stop_reason == "tool_use"
    started = [event.content_block.type for event in events if event.type == "content_block_start"]
    assert started == ["text", "tool_use", "tool_use"]
    assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1, 2]
    assert any(event.type == "input_json" for event in events)


def test_tools_count_as_tokens(server: LiveServer, client: Anthropic) -> None:
    fields = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    counted = client.messages.count_tokens(**fields).input_tokens
    server.script(reply="x")
    assert counted == client.messages.create(**ASKED).usage.input_tokens
    without = {**fields, "tools": []}
    assert client.messages.count_tokens(**without).input_tokens < counted


def test_a_choice_of_no_tool_gives_text(server: LiveServer, client: Anthropic) -> None:
    server.script(reply=CALL)
    message = client.messages.create(**ASKED, tool_choice={"type": "none"})
    assert ([block.type for block in message.content], message.stop_reason) == (["text"], "end_turn")


def test_one_call_where_several_are_not_wanted(server: LiveServer, client: Anthropic) -> None:
    server.script(reply=CALL + "\n" + CALL)
    message = client.messages.create(**ASKED, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in message.content].count("tool_use") == 1


def test_the_tool_runner_goes_on_without_the_thread_that_it_asks_for(server: LiveServer, client: Anthropic) -> None:
    """The client would have the server hold the conversation. The code of the refusal makes it send everything."""

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return "rain in " + city

    server.script(reply=CALL)
    fields = {name: value for name, value in ASKED.items() if name != "tools"}
    runner = client.beta.messages.tool_runner(**fields, tools=[get_weather], max_iterations=2)
    assert [message.stop_reason for message in runner] == ["tool_use", "tool_use"]
    assert "rain in Zürich" in server.state.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)


def test_errors_about_tools_name_the_field(server: LiveServer, client: Anthropic) -> None:
    def refusal(**fields: object) -> tuple[str, str]:
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(**{**ASKED, **fields})
        error = refused.value.body["error"]
        assert error["details"]["param"] in error["message"]
        return error["details"]["param"], error["details"]["error_code"]

    assert refusal(tools=[{"type": "web_search_20250305", "name": "web_search"}]) == (
        "tools[0]",
        "unsupported_parameter",
    )
    assert refusal(tools=[{"name": "f"}])[0] == "tools[0].input_schema"
    assert refusal(tools=[{**WEATHER, "name": "no name"}])[0] == "tools"
    assert refusal(tool_choice={"type": "some"})[0] == "tool_choice"
    assert refusal(tool_choice={"type": "tool", "name": "other"})[0] == "tool_choice"
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}
    at = "messages[0].content[0].tool_use_id"
    assert refusal(messages=[{"role": "user", "content": [result]}])[0] == at
