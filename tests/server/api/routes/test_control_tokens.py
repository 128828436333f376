"""Token ids that the model lacks, and control tokens in prompts and stop strings: over HTTP, with a fake engine."""

import dataclasses
from typing import Any

import pytest

from guanaco.server.engine.request import SamplingParams
from support.server.api_server import BASE, LiveServer, make_state
from support.server.fake_engine import BOS, END, USER, VOCAB_SIZE

ROWS = VOCAB_SIZE - 2  # the tokenizer has two ids more than the model has embedding rows
END_TEXT = "<end>"
MESSAGE = {"role": "user", "content": "a"}


def post(server: LiveServer, route: str, **body: Any) -> Any:
    with server.client() as client:
        return client.post(route, json={"model": BASE, "max_tokens": 4, **body})


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/completions", {"prompt": [1, ROWS]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], [ROWS + 1]]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(ROWS): 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [ROWS]}, "stop_token_ids"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "stop_token_ids": [ROWS]},
            "stop_token_ids",
        ),
    ],
)
def test_ids_beyond_the_embedding_rows_are_refused(route: str, body: dict[str, Any], param: str) -> None:
    state = dataclasses.replace(make_state(), num_rows=ROWS)
    with LiveServer(state) as server:
        answer = post(server, route, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert str(ROWS) in answer.json()["error"]["message"]
        assert not server.engine.requests


def test_text_and_templates_that_lead_beyond_the_rows_are_refused() -> None:
    state = dataclasses.replace(make_state(), num_rows=ord("b"))  # as a tokenizer whose added tokens have no rows
    with LiveServer(state) as server:
        for route, body in (
            ("/v1/completions", {"prompt": "b"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "b"}]}),
            ("/tokenize", {"prompt": "b"}),
        ):
            assert post(server, route, **body).status_code == 400, route
        assert not server.engine.requests


def test_raw_prompts_hold_control_tokens_and_chat_messages_do_not() -> None:
    with LiveServer(make_state()) as server:
        post(server, "/v1/completions", prompt=f"a{END_TEXT}")
        post(server, "/v1/chat/completions", messages=[{"role": "user", "content": f"a{END_TEXT}"}])
        raw, chat = (list(request.prompt_token_ids) for request in server.engine.requests)
        assert raw == [BOS, ord("a"), END]
        assert chat[:3] == [BOS, USER, ord("a")]
        assert chat.count(END) == 1  # the template's own
        tokens = post(server, "/tokenize", prompt=f"a{END_TEXT}").json()["tokens"]
        assert tokens == raw


def test_literal_prompts_keep_them_text() -> None:
    with LiveServer(make_state(literal_prompts=True)) as server:
        post(server, "/v1/completions", prompt=f"a{END_TEXT}")
        assert END not in server.engine.requests[0].prompt_token_ids
        assert END not in post(server, "/tokenize", prompt=END_TEXT).json()["tokens"]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_stop_string_that_is_a_control_token_stops_at_it(route: str) -> None:
    prompt = {"prompt": "a"} if route == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    with LiveServer(make_state()) as server:
        post(server, route, **prompt, stop=[END_TEXT, "text"])
        params: SamplingParams = server.engine.requests[0].params
        assert END in params.stop_token_ids
        assert params.stop_token_texts == ((END, END_TEXT),)
        assert params.stop_strings == (END_TEXT, "text")  # a model may spell it in letters, too
        assert not params.stops_see_control
        post(server, route, **prompt, stop=[f"{END_TEXT}x"])
        params = server.engine.requests[1].params
        assert (params.stop_token_ids, params.stop_token_texts) == (frozenset(), ())
        assert params.stops_see_control


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_reason_is_the_stop_string(include: bool) -> None:
    """The engine ends at a token; the client named it by its text, and sees it if that was asked for."""
    from guanaco.server.engine.request import FinishReason, Request, TokenOutput
    from guanaco.server.engine.request_stream import RequestStream

    params = SamplingParams(
        4, stop_token_ids=frozenset({END}), stop_token_texts=((END, END_TEXT),), include_stop_str=include
    )
    stream = RequestStream(Request("r", (BOS,), params), make_state().tokenizer, lambda *_: None)
    outputs: list[Any] = []
    stream.listen(outputs.append)
    stream.deliver(TokenOutput("r", (END,), finish_reason=FinishReason.STOP, stop_reason=END))
    assert [(output.text, output.stop_reason) for output in outputs] == [(END_TEXT * include, END_TEXT)]


def test_ids_of_rows_that_only_pad_the_embeddings_are_no_text() -> None:
    state = dataclasses.replace(make_state(), num_rows=VOCAB_SIZE + 2)
    with LiveServer(state) as server, server.client() as client:
        answer = client.post("/detokenize", json={"tokens": [ord("a"), VOCAB_SIZE + 1, ord("b")]})
        assert (answer.status_code, answer.json()["prompt"]) == (200, "ab")
        assert client.post("/detokenize", json={"tokens": [VOCAB_SIZE + 2]}).status_code == 400


@pytest.mark.parametrize("prompt", [f"a{END_TEXT}b", f"{END_TEXT}a", f"<bos>a{END_TEXT}{END_TEXT}"])
def test_offsets_of_an_echoed_prompt_count_its_control_tokens(prompt: str) -> None:
    with LiveServer(make_state()) as server:
        choice = post(server, "/v1/completions", prompt=prompt, echo=True, logprobs=1).json()["choices"][0]
        assert choice["text"].startswith(prompt)
        logprobs = choice["logprobs"]
        pairs = [*zip(logprobs["tokens"], logprobs["text_offset"], strict=True)]
        first = 0 if prompt.startswith("<bos>") else 1  # BOS that the server put in front is not in the text
        written = [(token, offset) for token, offset in pairs[first:] if offset < len(prompt)]
        assert "".join(token for token, _ in written) == prompt
        assert all(prompt.startswith(token, offset) for token, offset in written)
