"""/tokenize and its neighbours: how much one answer holds, and what is told of the tokenizer."""

import pytest

from guanaco.server.api.messages import routes as messages_routes
from guanaco.server.api.routes import tokens
from support.server.api_server import BASE, LiveServer, make_state

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
