"""allowed_token_ids and bad_words: what reaches the engine, and what is refused."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.api.generation.sampling import bad_word_ids
from guanaco.server.api.values.tokens import MAX_BAD_WORD_CHARS, MAX_BAD_WORDS
from support.models.tiny_tokenizers import write_byte_level, write_sentencepiece_like
from support.server.api_server import BASE, LiveServer
from support.server.fake_engine import END, VOCAB_SIZE

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
}


def post(client: httpx.Client, route: str, **fields: Any) -> httpx.Response:
    return client.post(route, json={"model": BASE, "max_tokens": 1, **BODIES[route], **fields})


@pytest.mark.parametrize("route", BODIES)
def test_they_reach_the_engine(server: LiveServer, client: httpx.Client, route: str) -> None:
    assert post(client, route, allowed_token_ids=[1, 40, 1], bad_words=["ab", "<end>", "ab"]).status_code == 200
    params = server.engine.requests[-1].params
    assert params.allowed is not None
    assert params.allowed.words.tolist() == [2, 1 << 8]
    assert params.bad_words == (tuple(b"ab"), (END,))
    for fields in ({"allowed_token_ids": None, "bad_words": None}, {"bad_words": []}, {}):
        assert post(client, route, **fields).status_code == 200
        params = server.engine.requests[-1].params
        assert (params.allowed, params.bad_words) == (None, ())


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": []},
        {"allowed_token_ids": [-1]},
        {"allowed_token_ids": [True]},
        {"allowed_token_ids": ["1"]},
        {"allowed_token_ids": [VOCAB_SIZE]},
        {"allowed_token_ids": [1], "response_format": {"type": "json_object"}},
        {"bad_words": "ab"},
        {"bad_words": [""]},
        {"bad_words": [" "]},
        {"bad_words": [1]},
        {"bad_words": ["x" * (MAX_BAD_WORD_CHARS + 1)]},
        {"bad_words": ["x"] * (MAX_BAD_WORDS + 1)},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_wrong_values(client: httpx.Client, route: str, fields: dict) -> None:
    response = post(client, route, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(fields)))


@pytest.mark.parametrize("write", [write_byte_level, write_sentencepiece_like])
def test_a_word_is_forbidden_with_a_space_in_front_too(tmp_path: Path, write: Any) -> None:
    """As vLLM has it: the second form counts where it begins with another token and has as many."""
    path = tmp_path / "t"
    path.mkdir()
    write(path)
    tokenizer = Tokenizer.from_directory(path)
    for word in ("the", " the", "is", "zq"):
        bare = tuple(tokenizer.encode(word.lstrip(), add_bos=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_bos=False))
        both = len(bare) == len(spaced) and bare[0] != spaced[0]
        assert bad_word_ids([word], tokenizer) == ((bare, spaced) if both else (bare,))
