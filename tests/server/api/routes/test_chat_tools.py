"""Tools over HTTP: calls in whole and streamed answers, histories, choices, /tokenize, and the official client."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from openai import OpenAI

from support.server.api_server import BASE, WAIT, LiveServer, make_state, sse_data
from support.server.fake_engine import ASSISTANT, END, NO_TOOLS, USER, FakeTemplate, reply_of

ROUTE = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
QUESTION = {"role": "user", "content": "Weather?"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
ARGUMENTS = '{"city": "Zürich"}'


@pytest.fixture(scope="module")
def client(shared: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=shared.url + "/v1", api_key="x", max_retries=0, timeout=WAIT) as made:
        yield made


def body(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [QUESTION], "tools": [WEATHER, TIME], **fields}


def post(server: LiveServer, status: int = 200, route: str = ROUTE, **fields: Any) -> Any:
    with server.client() as http:
        response = http.post(route, json=body(**fields))
    assert response.status_code == status, response.text
    return sse_data(response.content) if fields.get("stream") and status == 200 else response.json()


def test_a_call_in_a_whole_answer(server: LiveServer) -> None:
    server.script(reply="I look. " + CALL)
    answer = post(server)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", "I look.")
    (call,) = message["tool_calls"]
    assert re.fullmatch("call_[A-Za-z0-9]{24}", call["id"])
    assert (call["type"], call["function"]) == ("function", {"name": "get_weather", "arguments": ARGUMENTS})
    assert answer["usage"]["completion_tokens"] == len("I look. " + CALL) + 1


def test_a_call_alone_leaves_no_content(server: LiveServer) -> None:
    server.script(reply=CALL)
    assert post(server)["choices"][0]["message"]["content"] is None


def test_the_deltas_of_a_stream(server: LiveServer) -> None:
    server.script(reply="I look.\n" + CALL + "\n" + CALL.replace("Zürich", "Basel"))
    events = post(server, stream=True, stream_options={"include_usage": True})
    assert events.pop() == "[DONE]"
    assert events.pop()["usage"]["completion_tokens"] > 50
    choices = [event["choices"][0] for event in events]
    texts = [c["delta"] for c in choices if "content" in c["delta"] and "tool_calls" not in c["delta"]]
    assert "".join(delta["content"] for delta in texts) == "I look."
    assert choices[0]["delta"] == {"role": "assistant", "content": "I"}
    calls = [c["delta"]["tool_calls"][0] for c in choices if "tool_calls" in c["delta"]]
    assert [call["index"] for call in calls] == [0, 0, 1, 1]
    for first, arguments, city in ((calls[0], calls[1], "Zürich"), (calls[2], calls[3], "Basel")):
        assert first == {
            "index": first["index"],
            "id": first["id"],
            "type": "function",
            "function": {"name": "get_weather", "arguments": ""},
        }
        assert json.loads(arguments["function"]["arguments"]) == {"city": city}
        assert set(arguments) == {"index", "function"}
    assert calls[0]["id"] != calls[2]["id"]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "tool_calls")


def test_a_stream_that_begins_with_a_call(server: LiveServer) -> None:
    server.script(reply=CALL)
    first = post(server, stream=True)[0]["choices"][0]["delta"]
    assert (first["role"], first["content"]) == ("assistant", None)
    assert first["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_content(server: LiveServer, stream: bool) -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": </tool_call> {"a": 1}\n'
    server.script(reply=text)
    answer = post(server, stream=stream)
    if stream:
        choices = [event["choices"][0] for event in answer[:-1]]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == text
        assert choices[-1]["finish_reason"] == "stop"
    else:
        message = answer["choices"][0]["message"]
        assert message["content"] == text
        assert "tool_calls" not in message
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_an_answer_that_is_cut_off(server: LiveServer) -> None:
    server.script(reply=CALL)
    (choice,) = post(server, max_tokens=30)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL[:30], "length")
    (choice,) = post(server, max_tokens=len(CALL))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "length"), "complete, and so a call"
    assert choice["message"]["tool_calls"]


def test_several_choices(server: LiveServer) -> None:
    server.script(reply=CALL)
    choices = post(server, n=3)["choices"]
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
    assert len(ids) == 3
    events = post(server, n=2, stream=True)[:-1]
    for index in (0, 1):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert [c["delta"]["tool_calls"][0]["index"] for c in own if "tool_calls" in c["delta"]] == [0, 0]
        assert own[-1]["finish_reason"] == "tool_calls"


def test_one_call_where_more_are_not_wanted(server: LiveServer) -> None:
    server.script(reply=CALL + CALL)
    message = post(server, parallel_tool_calls=False)["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1
    assert message["content"] == CALL, "nothing is lost"


def test_log_probabilities_are_of_all_tokens(server: LiveServer) -> None:
    server.script(reply="Hm. " + CALL)
    whole = post(server, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert len(whole) == len("Hm. " + CALL) + 1
    chunks = post(server, logprobs=True, stream=True)[:-1]
    streamed = [entry for c in chunks for entry in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole]


def test_no_tools_are_told_and_no_calls_read_with_choice_none(server: LiveServer) -> None:
    server.script(reply=CALL)
    message = post(server, tool_choice="none")["choices"][0]["message"]
    assert message["content"] == CALL
    assert "tool_calls" not in message
    prompt = server.engine.requests[-1].prompt_token_ids
    server.script(reply=CALL)
    with server.client() as http:
        http.post(ROUTE, json={"model": BASE, "messages": [QUESTION]})
    assert server.engine.requests[-1].prompt_token_ids == prompt


def test_the_default_prompt_and_a_history(server: LiveServer) -> None:
    history = [
        QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Zürich"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "21 <end>"}]},
    ]
    post(server, messages=history, max_tokens=1)
    ids = server.engine.requests[-1].prompt_token_ids
    text = bytes(token for token in ids if token < 256).decode()
    assert "<tools>\n" + json.dumps(WEATHER) in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>' in text
    assert "<tool_response>\n21 <end>\n</tool_response>" in text
    assert [token for token in ids if token in (USER, END)] == [END, USER, END, END, USER, END]
    tokens = post(server, route="/tokenize", messages=history)["tokens"]
    assert tuple(tokens) == ids


def test_tokenize_counts_the_tools_that_chat_would_tell(server: LiveServer) -> None:
    def count(**fields: Any) -> int:
        return int(post(server, route="/tokenize", **fields)["count"])

    with_tools = count()
    assert with_tools > count(tools=[TIME]) > count(tool_choice="none") == count(tools=None)
    post(server, max_tokens=1)
    assert len(server.engine.requests[-1].prompt_token_ids) == with_tools


def test_a_template_with_tools_gets_them_and_hidden_markers_are_shown() -> None:
    """A marker that is a control token would be left out of the text, and the call would not be found."""
    state = make_state(tool_format="mistral")
    state.tokenizer.control_id = {"[TOOL_CALLS]": END}.get
    with LiveServer(state) as server:
        server.script(reply='[TOOL_CALLS][{"name": "get_time", "arguments": {}}]')
        assert post(server)["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_time"
        params = server.engine.requests[-1].params
        assert not params.skip_special_tokens
        assert params.hidden_token_ids == state.tokenizer.special_ids - {END}
        post(server, max_tokens=1, tool_choice="none")
        assert server.engine.requests[-1].params.skip_special_tokens
        post(server, max_tokens=1, skip_special_tokens=False)
        assert server.engine.requests[-1].params.hidden_token_ids == frozenset()


def test_a_forced_call_is_begun_in_the_prompt_where_its_marker_is_a_control_token() -> None:
    state = make_state(tool_format="mistral")
    state.tokenizer.control_id = {"[TOOL_CALLS]": END}.get
    with LiveServer(state) as server:
        server.script(reply=' [{"name": "get_time", "arguments": {}}]')
        answer = post(server, tool_choice="required")
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_time"
        ids = server.engine.requests[-1].prompt_token_ids
        assert ids[-2:] == (ASSISTANT, END)
        assert tuple(post(server, route="/tokenize", tool_choice="required")["tokens"]) == ids
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert post(server, route="/tokenize", tool_choice="auto")["tokens"][-1] == ASSISTANT


def test_the_models_template_for_tools_is_used_where_there_are_tools() -> None:
    state = make_state()
    all_of_them = replace(NO_TOOLS, tools=True, calls=True, results=True)
    state.tokenizer.tool_template = FakeTemplate(source="[TOOL_CALLS]", tool_support=all_of_them)
    with LiveServer(state) as server:
        server.script(reply='[TOOL_CALLS][{"name": "get_time"}]')
        assert post(server)["choices"][0]["message"]["tool_calls"]
        ids = server.engine.requests[-1].prompt_token_ids
        assert json.dumps([WEATHER]).encode()[:-1] in bytes(token for token in ids if token < 256)
        assert tuple(post(server, route="/tokenize")["tokens"]) == ids
        assert post(server, tool_choice="none")["choices"][0]["message"]["content"].startswith("[TOOL_CALLS]")


def test_the_setting_none_leaves_answers_alone() -> None:
    with LiveServer(make_state(tool_format="none")) as server:
        server.script(reply=CALL)
        assert post(server)["choices"][0]["message"]["content"] == CALL


def test_a_template_that_overruns_in_the_trial_is_an_error_of_the_template(server: LiveServer) -> None:
    from guanaco.models.error_codes import ErrorCode
    from guanaco.models.errors import TemplateError

    class Overrun(FakeTemplate):
        @property
        def tool_support(self) -> Any:
            raise TemplateError("SECRET", ErrorCode.TEMPLATE_TIMEOUT)

        @tool_support.setter
        def tool_support(self, value: Any) -> None: ...

    state = make_state()
    state.tokenizer.chat_template = object.__new__(Overrun)
    with LiveServer(state) as other:
        error = post(other, status=400)["error"]
    assert error["code"] == "template_timeout"
    assert "SECRET" not in json.dumps(error)


def test_old_forms_are_refused_with_what_to_use(server: LiveServer) -> None:
    for fields, words in (
        ({"functions": [{"name": "f"}]}, "use tools"),
        ({"function_call": "auto"}, "use tool_choice"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "role tool"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "use tool_calls"),
    ):
        assert words in post(server, status=400, **fields)["error"]["message"]


def test_tools_that_are_too_much_for_the_context(server: LiveServer) -> None:
    big = {"type": "function", "function": {"name": "f", "description": "x" * 30000}}
    error = post(
        server, status=400, tools=[{**big, "function": {**big["function"], "name": f"f{i}"}} for i in range(20)]
    )
    assert error["error"]["code"] == "context_length_exceeded"


# --- the official client ------------------------------------------------------------------------------------------


def test_a_round_trip(server: LiveServer, client: OpenAI) -> None:
    """As its documentation has it: the answer's message goes back as it is, with the tool's answer behind it."""
    server.script(reply=CALL)
    messages: list[Any] = [QUESTION]
    answer = client.chat.completions.create(model=BASE, messages=messages, tools=[WEATHER, TIME], tool_choice="auto")
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Zürich"}
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "21"}]
    server.script()
    answer = client.chat.completions.create(model=BASE, messages=messages, tools=[WEATHER, TIME])
    assert answer.choices[0].message.content == reply_of(server.engine.requests[-1])
    assert answer.choices[0].message.tool_calls is None
    answer = client.chat.completions.create(model=BASE, messages=messages, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].finish_reason == "stop"


def test_the_streaming_helper(server: LiveServer, client: OpenAI) -> None:
    server.script(reply="I look. " + CALL)
    with client.chat.completions.stream(model=BASE, messages=[QUESTION], tools=[WEATHER]) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = [event.type for event in events]
    assert kinds.count("tool_calls.function.arguments.done") == 1
    message = final.choices[0].message
    assert message.content == "I look."
    assert message.tool_calls[0].function.name == "get_weather"
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Zürich"}
