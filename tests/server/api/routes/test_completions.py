"""Text completions over HTTP: prompts of every kind, echo, logprobs as lm-eval reads them."""

import pytest

from guanaco.server.api.generation.protocol import MAX_PROMPTS
from guanaco.server.config import Settings
from support.server.api_server import BASE, MAX_MODEL_LEN, TERSE, LiveServer, sse_data
from support.server.fake_engine import BOS, EOS, FakeTokenizer, reply_of

ROUTE = "/v1/completions"


def post(server: LiveServer, status: int = 200, **body: object) -> dict:
    with server.client() as client:
        response = client.post(ROUTE, json={"model": BASE, **body})
    assert response.status_code == status, response.text
    return response.json()


def stream(server: LiveServer, **body: object) -> list:
    with server.client() as client:
        response = client.post(ROUTE, json={"model": BASE, "stream": True, **body})
    assert response.status_code == 200, response.text
    return sse_data(response.content)


def test_whole_answer(server: LiveServer) -> None:
    answer = post(server, prompt="abc", max_tokens=11, model=TERSE)
    request = server.engine.requests[-1]
    assert request.prompt_token_ids == (BOS, *b"abc")
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == TERSE
    assert answer["choices"] == [
        {
            "index": 0,
            "text": reply_of(request)[:11],
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["total_tokens"] == 15


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("abc", [(BOS, *b"abc")]),
        (["abc", "é"], [(BOS, *b"abc"), (BOS, *"é".encode())]),
        ([97, 98], [(97, 98)]),  # ids are taken as they are: no BOS (lm-eval sends its own)
        ([[97], [BOS, 98, 99]], [(97,), (BOS, 98, 99)]),
    ],
)
def test_prompt_kinds(server: LiveServer, prompt: object, expected: list) -> None:
    answer = post(server, prompt=prompt, max_tokens=6)
    requests = server.engine.requests[-len(expected) :]
    assert [r.prompt_token_ids for r in requests] == expected
    assert [c["text"] for c in answer["choices"]] == [reply_of(r)[:6] for r in requests]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_add_special_tokens_false_leaves_bos_out(server: LiveServer) -> None:
    post(server, prompt="abc", max_tokens=1, add_special_tokens=False)
    assert server.engine.requests[-1].prompt_token_ids == tuple(b"abc")


def test_several_prompts_times_n(server: LiveServer) -> None:
    server.script(cached_tokens=2)
    answer = post(server, prompt=["abc", "defg"], n=2, best_of=2, seed=5, max_tokens=4)
    requests = server.engine.requests[-4:]
    assert [bytes(r.prompt_token_ids[1:]) for r in requests] == [b"abc", b"abc", b"defg", b"defg"]
    assert [r.params.seed for r in requests] == [5, 6, 5, 6]
    assert [c["text"] for c in answer["choices"]] == [reply_of(r)[:4] for r in requests]
    assert answer["usage"] == {
        "prompt_tokens": 4 + 5,
        "completion_tokens": 16,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_several_prompts_in_one_stream(server: LiveServer) -> None:
    events = stream(server, prompt=["abc", "defg", "h"], max_tokens=20, stream_options={"include_usage": True})
    chunks = [event["choices"][0] for event in events[:-2]]
    for index, request in enumerate(server.engine.requests[-3:]):
        assert "".join(c["text"] for c in chunks if c["index"] == index) == reply_of(request)[:20]
    assert all(set(c) >= {"index", "text", "logprobs", "finish_reason"} for c in chunks)
    assert events[-2]["choices"] == []
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize("streaming", [False, True])
def test_echo(server: LiveServer, streaming: bool) -> None:
    for prompt, echoed in ((["ab€", "c"], ["ab€", "c"]), ([[104, 105], [BOS, 33]], ["hi", "!"])):
        body = {"prompt": prompt, "max_tokens": 7, "echo": True}
        if streaming:
            chunks = [event["choices"][0] for event in stream(server, **body)[:-1]]
            texts = ["".join(c["text"] for c in chunks if c["index"] == i) for i in range(2)]
        else:
            texts = [c["text"] for c in post(server, **body)["choices"]]
        replies = [reply_of(r)[:7] for r in server.engine.requests[-2:]]
        assert texts == [echo + reply for echo, reply in zip(echoed, replies, strict=True)]


def test_logprobs(server: LiveServer) -> None:
    answer = post(server, prompt="ab", max_tokens=30, logprobs=2)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 30
    assert logprobs["token_logprobs"] == [-0.125] * 30
    assert server.engine.requests[-1].params.logprobs == 2
    assert server.engine.requests[-1].params.prompt_logprobs is None


def test_echo_with_logprobs_is_what_lm_eval_reads(server: LiveServer) -> None:
    """Its request, and its way of taking the answer apart (lm_eval/models/openai_completions.py, parse_logprobs)."""
    contexts = [[97, 98, 99, 100], [BOS, 104, 105]]
    context_lengths = [3, 1]
    answer = post(server, prompt=contexts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    for choice, context, context_length in zip(
        sorted(answer["choices"], key=lambda c: c["index"]), contexts, context_lengths, strict=True
    ):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(context) + 1, "the prompt, and the one token generated"
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        tokens = logprobs["token_logprobs"][context_length:-1]
        tops = logprobs["top_logprobs"][context_length:-1]
        assert len(tokens) == len(context) - context_length
        assert sum(tokens) == -0.125 * len(tokens)
        assert all(token == max(top.values()) for token, top in zip(tokens, tops, strict=True)), "greedy, exactly"
    assert server.engine.requests[-1].params.prompt_logprobs == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_no_tokens_and_echo_score_the_prompts(server: LiveServer, streaming: bool) -> None:
    """As OpenAI's route does it; strings and token ids, several at once. Nothing is generated."""
    for prompt, ids in (
        ([[97, 98, 99], [BOS]], [(97, 98, 99), (BOS,)]),
        (["ab", "c"], [(BOS, *b"ab"), (BOS, *b"c")]),
    ):
        body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0, "model": TERSE}
        if streaming:
            events = stream(server, **body, stream_options={"include_usage": True})
            choices = sorted((e["choices"][0] for e in events[:-2]), key=lambda choice: choice["index"])
            usage = events[-2]["usage"]
        else:
            answer = post(server, **body)
            choices, usage = answer["choices"], answer["usage"]
        assert [r.prompt_token_ids for r in server.engine.requests[-2:]] == ids
        assert all(r.params.max_tokens == 0 and r.params.prompt_logprobs == 1 for r in server.engine.requests[-2:])
        assert usage["completion_tokens"] == 0
        assert usage["total_tokens"] == usage["prompt_tokens"] == sum(map(len, ids))
        for choice, tokens in zip(choices, ids, strict=True):
            assert choice["text"] == FakeTokenizer().decode(tokens)
            assert choice["finish_reason"] == "length"
            logprobs = choice["logprobs"]
            assert logprobs["token_logprobs"] == [None] + [-0.125] * (len(tokens) - 1)
            assert logprobs["top_logprobs"][0] is None
            assert all(max(top.values()) == -0.125 for top in logprobs["top_logprobs"][1:])


def test_a_scored_prompt_may_fill_the_context_and_is_counted(server: LiveServer) -> None:
    def counted() -> float:
        return server.state.metrics.registry.get_sample_value(
            "vllm:prompt_tokens_total", {"model_name": BASE, "engine": "0"}
        )

    before = counted()
    ids = [97] * MAX_MODEL_LEN
    post(server, prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert counted() == before + MAX_MODEL_LEN
    for wrong in ({"prompt": [*ids, 97], "max_tokens": 0}, {"prompt": ids, "max_tokens": 1}, {"prompt": ids}):
        error = post(server, 400, **wrong, echo=True)["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_what_a_scored_prompt_needs(server: LiveServer) -> None:
    error = post(server, 400, prompt="abc", max_tokens=0)["error"]
    assert error["param"] == "max_tokens"
    assert "echo" in error["message"]
    assert post(server, prompt="abc", max_tokens=0, echo=True)["choices"][0]["text"] == "abc", "without logprobs"
    many = {"prompt": [[97] * MAX_MODEL_LEN] * 13, "max_tokens": 0, "echo": True}
    error = post(server, 400, **many, logprobs=20)["error"]  # 13 x 4096 x 21
    assert (error["param"], str(2**20) in error["message"]) == ("logprobs", True)
    assert post(server, **{**many, "prompt": many["prompt"][:1]}, logprobs=20)["choices"]


def test_echo_with_logprobs_of_an_answer_that_ends_at_once(server: LiveServer) -> None:
    post(server, prompt=[97, 98])
    reply = reply_of(server.engine.requests[-1])
    answer = post(server, prompt=[97, 98], logprobs=1, echo=True, stop=reply[0])
    assert answer["choices"][0]["text"] == "ab"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3


def test_text_offsets_point_into_the_text(server: LiveServer) -> None:
    body = {"prompt": "xy", "max_tokens": 30, "logprobs": 0, "echo": True}
    choice = post(server, **body)["choices"][0]
    offsets = choice["logprobs"]["text_offset"]
    assert choice["logprobs"]["tokens"][0] == "<bos>"
    assert offsets[:4] == [0, 0, 1, 2], "BOS is a token of the prompt, but not of its text"
    assert [choice["text"][o] for o in offsets[1:3]] == ["x", "y"]
    streamed = [event["choices"][0]["logprobs"] for event in stream(server, **body)[:-1]]
    assert [o for chunk in streamed for o in chunk["text_offset"]] == offsets
    assert [t for chunk in streamed for t in chunk["tokens"]] == choice["logprobs"]["tokens"]


def test_default_length_is_openais(server: LiveServer) -> None:
    post(server, prompt="abc")
    assert server.engine.requests[-1].params.max_tokens == 16
    post(server, prompt="x" * (MAX_MODEL_LEN - 6))
    assert server.engine.requests[-1].params.max_tokens == 5, "no more than there is room for"
    answer = post(server, prompt="abc", stream=False, max_tokens=None)
    assert answer["choices"][0]["finish_reason"] == "length"
    error = post(server, 400, prompt="abc", min_tokens=17)["error"]
    assert error["param"] == "min_tokens"
    assert "16 tokens" in error["message"]


def test_as_many_stop_strings_as_lm_evals_tasks_send(server: LiveServer) -> None:
    stops = [f"stop {i}" for i in range(16)]
    post(server, prompt="abc", stop=stops)
    assert server.engine.requests[-1].params.stop_strings == tuple(stops)
    error = post(server, 400, prompt="abc", stop=[*stops, "one more"])["error"]
    assert (error["param"], "16" in error["message"]) == ("stop", True)


def test_twenty_logprobs(server: LiveServer) -> None:
    post(server, prompt="abc", logprobs=20, max_tokens=2)
    assert server.engine.requests[-1].params.logprobs == 20
    assert post(server, 400, prompt="abc", logprobs=21)["error"]["param"] == "logprobs"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x" * MAX_MODEL_LEN}, "prompt"),
        ({"prompt": [[1], [1] * (MAX_MODEL_LEN + 1)]}, "prompt"),
        ({"prompt": "x", "max_tokens": MAX_MODEL_LEN}, "max_tokens"),
    ],
)
def test_context_limits(server: LiveServer, body: dict, param: str) -> None:
    before = len(server.engine.requests)
    error = post(server, 400, **body)["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert str(MAX_MODEL_LEN) in error["message"]
    assert len(server.engine.requests) == before


def test_end_of_sequence_counts_as_a_token(server: LiveServer) -> None:
    answer = post(server, prompt="abc", max_tokens=1000)
    reply = reply_of(server.engine.requests[-1])
    assert answer["choices"][0]["text"] == reply
    assert answer["usage"]["completion_tokens"] == len(reply) + 1


class TestTokenRoutes:
    def test_tokenize_text(self, server: LiveServer) -> None:
        with server.client() as client:
            answer = client.post("/tokenize", json={"prompt": "aé", "return_token_strs": True}).json()
            assert answer["tokens"] == [BOS, *"aé".encode()]
            assert answer["count"] == 4
            assert answer["max_model_len"] == MAX_MODEL_LEN
            assert answer["token_strs"][:2] == ["<bos>", "a"]
            plain = client.post("/tokenize", json={"prompt": "a", "add_special_tokens": False, "model": BASE}).json()
            assert plain["tokens"] == [97]
            assert "token_strs" not in plain
            unknown = client.post("/tokenize", json={"prompt": "a", "model": "nobody"})
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")

    def test_tokenize_messages_as_chat_does(self, server: LiveServer) -> None:
        messages = [{"role": "user", "content": "hi"}]
        with server.client() as client:
            answer = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
        assert answer["tokens"] == FakeTokenizer().encode_chat(messages, add_generation_prompt=False)

    def test_detokenize(self, server: LiveServer) -> None:
        with server.client() as client:
            assert client.post("/detokenize", json={"tokens": [*"é".encode(), EOS]}).json() == {"prompt": "é<eos>"}

    def test_tokenizer_info_has_what_lm_eval_asks_for(self, server: LiveServer) -> None:
        with server.client() as client:
            info = client.get("/tokenizer_info").json()
        assert info["eos_token"] == "<eos>"
        assert info["bos_token"] == "<bos>"

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}),
            ("/tokenize", {"prompt": 5}),
            ("/tokenize", {"messages": []}),
            ("/tokenize", {"prompt": "x" * (MAX_MODEL_LEN * 64 + 1)}),
            ("/detokenize", {}),
            ("/detokenize", {"tokens": [262]}),
            ("/detokenize", {"tokens": [-1]}),
            ("/detokenize", {"tokens": ["1"]}),
            ("/detokenize", {"tokens": "abc"}),
        ],
    )
    def test_bad_input(self, server: LiveServer, path: str, body: dict) -> None:
        with server.client() as client:
            response = client.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"]


@pytest.mark.parametrize("prompts", [["ab"], [[65, 66]]])
def test_a_batch_of_lm_eval_and_more_is_one_request(server: LiveServer, prompts: list) -> None:
    """Its batch_size is 64. Many prompts are as many requests of the engine, and the default queue holds them."""
    with server.client() as client:
        body = {"model": BASE, "max_tokens": 1, "temperature": 0}
        answer = client.post("/v1/completions", json={**body, "prompt": prompts * MAX_PROMPTS})
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(MAX_PROMPTS))
        refused = client.post("/v1/completions", json={**body, "prompt": prompts * (MAX_PROMPTS + 1)})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    most = Settings().max_queued_requests
    assert most * 3 // 4 >= MAX_PROMPTS, "of one adapter, three quarters of the queue"
    assert most // 4 >= 64, "a quarter, where the adapter has to be loaded first"
