"""/tokenize and its neighbours: how much one answer holds, and what is told of the tokenizer."""

from dataclasses import replace

import pytest

from guanaco.server.api.messages import routes as messages_routes
from guanaco.server.api.routes import tokens
from support.server.api_server import BASE, LiveServer, make_state
from support.server.fake_engine import FakeTemplate

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("path", "fields", "size"),
    [
        ("/tokenize", {"prompt": "hello"}, 6),
        ("/tokenize", {"messages": MESSAGES}, 9),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}, 9),
    ],
    ids=["prompt", "messages", "count"],
)
def test_no_more_ids_than_detokenize_takes(path: str, fields: dict, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, status in ((size, 200), (size - 1, 400)):
        for module in (tokens, messages_routes):
            monkeypatch.setattr(module, "MAX_TOKENS", most)
        with LiveServer(make_state()) as server, server.client() as client:
            answer = client.post(path, json={"model": BASE, **fields})
        assert answer.status_code == status, answer.text
    assert f"more than {size - 1} tokens" in answer.json()["error"]["message"]


def test_the_template_of_chats_is_told_to_those_who_may_tokenize() -> None:
    """An operator's template goes before the model's own, which a model may lack."""
    state = make_state(keys=("sesame",))
    headers = {"Authorization": "Bearer sesame"}
    own, given = FakeTemplate(source="own {{ messages }}"), FakeTemplate(source="given {{ messages }}")
    for of_tokenizer, of_operator in ((own, None), (own, given), (None, None)):
        state.tokenizer.chat_template = of_tokenizer
        shown = of_operator or of_tokenizer
        with LiveServer(replace(state, chat_template=of_operator)) as server, server.client() as client:
            assert client.get("/tokenizer_info").status_code == 401
            info = client.get("/tokenizer_info", headers=headers).json()
        assert info["chat_template"] == (None if shown is None else shown.source)
