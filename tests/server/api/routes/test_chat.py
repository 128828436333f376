"""Chat completions over HTTP: what reaches the engine, and the shape of what comes back."""

import json

from guanaco.server.api.generation.sampling import SamplingDefaults
from guanaco.server.engine.request import LoraRef, SamplingParams
from support.server.api_server import (
    BASE,
    MAX_MODEL_LEN,
    PIRATE,
    PIRATE_VERSION,
    LiveServer,
    chat_body,
    make_state,
    sse_data,
)
from support.server.fake_engine import ASSISTANT, BOS, END, SYSTEM, USER, FakeTemplate, reply_of

ROUTE = "/v1/chat/completions"


def post(server: LiveServer, body: dict, status: int = 200) -> dict:
    with server.client() as client:
        response = client.post(ROUTE, json=body)
    assert response.status_code == status, response.text
    return response.json()


def stream(server: LiveServer, body: dict) -> list:
    with server.client() as client:
        response = client.post(ROUTE, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    return sse_data(response.content)


def test_whole_answer(server: LiveServer) -> None:
    answer = post(server, chat_body("hello", max_tokens=25))
    request = server.engine.requests[-1]
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == BASE
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": reply_of(request)[:25], "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 25,
        "total_tokens": 34,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompt_goes_through_the_template(server: LiveServer) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "audio": None},
        {"role": "user", "content": "🦙"},
    ]
    post(server, {"model": BASE, "messages": messages, "max_tokens": 1})
    expected = [BOS, SYSTEM, *b"be kind", END, USER, *b"one\ntwo", END, ASSISTANT, END]
    expected += [USER, *"🦙".encode(), END, ASSISTANT]
    assert list(server.engine.requests[-1].prompt_token_ids) == expected


def test_add_generation_prompt_can_be_left_out(server: LiveServer) -> None:
    post(server, chat_body("x", max_tokens=1, add_generation_prompt=False))
    assert server.engine.requests[-1].prompt_token_ids[-1] == END


def test_adapter_is_chosen_by_model(server: LiveServer) -> None:
    answer = post(server, {**chat_body("x", max_tokens=3), "model": PIRATE})
    assert server.engine.requests[-1].loras == (LoraRef(PIRATE_VERSION),)
    assert answer["model"] == PIRATE
    other = post(server, chat_body("x", max_tokens=3))
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["system_fingerprint"] != other["system_fingerprint"]
    assert server.engine.requests[-1].loras == ()


def test_every_sampling_field_reaches_the_engine(server: LiveServer) -> None:
    fields = {
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.25,
        "seed": -5,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"65": -100, "66": 3.5},
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["zzz", "yyy"],
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "speculation": False,
    }
    post(server, chat_body("x", **fields))
    assert server.engine.requests[-1].params == SamplingParams(
        max_tokens=7,
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        min_p=0.25,
        seed=-5,
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        logit_bias=((65, -100.0), (66, 3.5)),
        logprobs=2,
        stop_token_ids=frozenset({3}),
        stop_strings=("zzz", "yyy"),
        include_stop_str=True,
        min_tokens=2,
        ignore_eos=True,
        skip_special_tokens=False,
        speculation=False,
    )


def test_omitted_and_null_fields_take_defaults(server: LiveServer) -> None:
    nulls = ("max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream", "logit_bias", "logprobs")
    nulls += ("tools", "tool_choice", "response_format", "stream_options", "user", "suffix", "stop_token_ids")
    post(server, chat_body("x"))
    post(server, chat_body("x", **dict.fromkeys(nulls)))
    plain, with_nulls = server.engine.requests[-2:]
    assert plain.params == with_nulls.params == SamplingParams(max_tokens=MAX_MODEL_LEN - len(plain.prompt_token_ids))


def test_the_models_own_defaults_apply_where_the_client_says_nothing() -> None:
    config = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "do_sample": True, "min_p": "x"}
    state = make_state()
    object.__setattr__(state, "defaults", SamplingDefaults.from_generation_config(config))
    with LiveServer(state) as server:
        post(server, chat_body("x", max_tokens=1))
        params = server.engine.requests[-1].params
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.6, 0.9, 50, 1.1)
        post(server, chat_body("x", max_tokens=1, temperature=0, top_p=1, top_k=0, repetition_penalty=1))
        params = server.engine.requests[-1].params
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0, 1, 0, 1)


def test_a_model_that_does_not_sample_is_greedy_unless_the_client_says_more() -> None:
    """transformers' `generate` ignores the temperature beside `do_sample: false`."""
    defaults = SamplingDefaults.from_generation_config({"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    assert defaults.temperature == 0
    assert SamplingDefaults.from_generation_config({"temperature": 0.6}).temperature == 0.6
    assert SamplingDefaults.from_generation_config({"do_sample": None}).temperature == 1
    state = make_state()
    object.__setattr__(state, "defaults", defaults)
    with LiveServer(state) as server:
        for fields, temperature in (({}, 0), ({"temperature": 0.7}, 0.7)):
            post(server, chat_body("x", max_tokens=1, **fields))
            assert server.engine.requests[-1].params.temperature == temperature


def test_harmless_fields_are_ignored(server: LiveServer) -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "stream_options": None,
        "best_of": 1,
        "something_new": {"deep": [1, None]},
    }
    post(server, chat_body("x", max_tokens=1, **harmless))


def test_stop_string_ends_the_answer_and_is_reported(server: LiveServer) -> None:
    answer = post(server, chat_body("hello", max_tokens=100, stop=" "))
    text = reply_of(server.engine.requests[-1]).split(" ")[0]
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == " "


def test_stop_strings_of_the_template() -> None:
    """A model of that format would go on and write the user's part too; unless it is to run on regardless."""
    state = make_state()
    state.tokenizer.chat_template = FakeTemplate(stop_strings=(" ", "### Human:"))
    with LiveServer(state) as server:
        answer = post(server, chat_body("hello", stop=["€", " "]))
        assert server.engine.requests[-1].params.stop_strings == ("€", " ", "### Human:")
        assert answer["choices"][0]["finish_reason"] == "stop"
        post(server, chat_body("hello", max_tokens=5, ignore_eos=True))
        assert server.engine.requests[-1].params.stop_strings == ()
        object.__setattr__(state, "chat_template", FakeTemplate(("own",)))
        post(server, chat_body("hello", max_tokens=5))
        assert server.engine.requests[-1].params.stop_strings == ("own",)
        with server.client() as client:
            client.post("/v1/completions", json={"model": BASE, "prompt": "x", "max_tokens": 5})
        assert server.engine.requests[-1].params.stop_strings == ()


def test_end_of_sequence_is_a_stop(server: LiveServer) -> None:
    answer = post(server, chat_body("hello"))
    assert answer["choices"][0]["message"]["content"] == reply_of(server.engine.requests[-1])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] is None


def test_n_choices_have_seeds_of_their_own(server: LiveServer) -> None:
    answer = post(server, chat_body("hello", max_tokens=9, n=3, seed=2**63 - 2))
    requests = server.engine.requests[-3:]
    assert [r.params.seed for r in requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert len({r.request_id for r in requests}) == 3
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [reply_of(r)[:9] for r in requests]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 9
    assert answer["usage"]["completion_tokens"] == 27


def test_stream_equals_whole_answer(server: LiveServer) -> None:
    body = chat_body("hello", max_tokens=40, seed=1)
    whole = post(server, body)
    events = stream(server, body)
    assert events[-1] == "[DONE]"
    assert events.count("[DONE]") == 1
    chunks = events[:-1]
    assert all(set(chunk["choices"][0]) >= {"index", "delta", "logprobs", "finish_reason"} for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 39 + ["length"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[0]["choices"][0]["delta"]["content"], "the role comes with the first text, not alone"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == BASE for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)


def test_n_choices_are_interleaved_in_one_stream(server: LiveServer) -> None:
    events = stream(server, chat_body("hello", max_tokens=30, n=4, seed=3))
    chunks = [event["choices"][0] for event in events[:-1]]
    texts = ["".join(c["delta"].get("content", "") for c in chunks if c["index"] == i) for i in range(4)]
    assert texts == [reply_of(r)[:30] for r in server.engine.requests[-4:]]
    assert sorted(c["index"] for c in chunks if c["finish_reason"]) == [0, 1, 2, 3]
    first_finish = next(i for i, c in enumerate(chunks) if c["finish_reason"])
    assert {c["index"] for c in chunks[:first_finish]} == {0, 1, 2, 3}, "choices come one after the other"


def test_tokens_without_text_make_no_chunk(server: LiveServer) -> None:
    """Half characters and what may become a stop string: load tools count chunks."""
    server.script(hide_every=2)
    events = stream(server, chat_body("hello", max_tokens=20, logprobs=True))
    chunks = [event["choices"][0] for event in events[:-1]]
    assert len(chunks) == 10
    assert all(chunk["delta"]["content"] for chunk in chunks)
    assert [len(chunk["logprobs"]["content"]) for chunk in chunks] == [2] * 10, "their logprobs come with the next text"


def test_answer_without_any_text_still_finishes(server: LiveServer) -> None:
    request_text = reply_of(_last_request(server))
    events = stream(server, chat_body("hello", stop=request_text[0]))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[0]["choices"][0]["finish_reason"] == "stop"
    assert events[1:] == ["[DONE]"]


def _last_request(server: LiveServer):
    post(server, chat_body("hello"))
    return server.engine.requests[-1]


def test_usage_chunk_comes_last_and_only_if_asked_for(server: LiveServer) -> None:
    server.script(cached_tokens=4)
    events = stream(server, chat_body("hello", max_tokens=5, n=2, stream_options={"include_usage": True}))
    *chunks, usage, done = events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 10,
        "total_tokens": 19,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)


def test_continuous_usage(server: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(server, chat_body("hello", max_tokens=5, stream_options=options))
    assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [1, 2, 3, 4, 5, 5]


def test_logprobs(server: LiveServer) -> None:
    body = chat_body("hello", max_tokens=12, logprobs=True, top_logprobs=2, seed=1)
    whole = post(server, body)["choices"][0]["logprobs"]["content"]
    text = reply_of(server.engine.requests[-1])[:12]
    first = text[0].encode()[0]
    assert whole[0] == {
        "token": bytes([first]).decode("utf-8", "replace"),
        "logprob": -0.125,
        "bytes": [first],
        "top_logprobs": [
            {"token": chr(first), "logprob": -0.125, "bytes": [first]},
            {"token": chr(first + 1), "logprob": -0.25, "bytes": [first + 1]},
        ],
    }
    assert [entry["bytes"] for entry in whole] == [[c.encode()[0]] for c in text]
    streamed = [event["choices"][0]["logprobs"]["content"] for event in stream(server, body)[:-1]]
    assert [entry for chunk in streamed for entry in chunk] == whole


def test_logprobs_without_top(server: LiveServer) -> None:
    whole = post(server, chat_body("hello", max_tokens=2, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in whole] == [[], []]
    assert server.engine.requests[-1].params.logprobs == 0


def test_template_that_refuses_the_messages(server: LiveServer) -> None:
    error = post(server, {"model": BASE, "messages": [{"role": "assistant", "content": "tell"}]}, 400)["error"]
    assert (error["code"], error["param"]) == ("template_error", "messages")
    assert "SECRET" not in json.dumps(error)
    assert "tell" not in error["message"].split()


def test_model_without_template() -> None:
    state = make_state()
    state.tokenizer.chat_template = None
    with LiveServer(state) as server:
        error = post(server, chat_body("x"), 400)["error"]
        assert error["code"] == "no_chat_template"
        assert "--chat-template" in error["message"]
