"""Tokenizer: golden ids of LLaMA's and the demo's vocabulary; llama.cpp and transformers are the oracles."""

import json
import re
import shutil
from pathlib import Path

import pytest

from guanaco.models.text.chat_template import named_template
from guanaco.models.text.special_ids import SpecialIds, reconcile_special_ids
from guanaco.models.text.tokenizer import Tokenizer
from support.models.hard_strings import HARD_STRINGS
from support.models.tiny_tokenizers import as_transformers

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path("/work/shared")
LLAMA = SHARED / "models/llama-tokenizer"
needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="LLaMA's vocabulary is not here")

# From llama-tokenizer-js.
LLAMA_IDS = {
    "Hello this is a test": [1, 15043, 445, 338, 263, 1243],
    "### Human: hi ### Assistant:": [1, 835, 12968, 29901, 7251, 835, 4007, 22137, 29901],
    "x.\n### Human:": [1, 921, 29889, 13, 2277, 29937, 12968, 29901],
    "x.### Human:": [1, 921, 29889, 2277, 29937, 12968, 29901],
}


def llamacpp_ids(file: str) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = json.loads((GOLDEN / file).read_text())["ids"]
    assert set(ids) == set(HARD_STRINGS), "run golden/make_llamacpp_ids.py again"
    return ids


@pytest.fixture(scope="module")
def llama_json() -> Tokenizer:
    return Tokenizer.from_directory(LLAMA)


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """From tokenizer.model alone."""
    path = tmp_path_factory.mktemp("llama")
    shutil.copy(LLAMA / "tokenizer.model", path)
    return Tokenizer.from_directory(path)


# --- LLaMA's own vocabulary ---------------------------------------------------------------------------------------


@needs_llama
@pytest.mark.parametrize("form", ["llama_json", "llama_model"])
def test_llama_golden_ids(form: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(form)
    for text, ids in LLAMA_IDS.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, add_bos=False) == ids[1:]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id) == (1, (2,), 0)
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (32000, {0, 1, 2})
    assert tokenizer.notes == ()
    assert tokenizer.chat_template is None


@needs_llama
def test_sentencepiece_file_gives_llamacpps_ids(llama_model: Tokenizer) -> None:
    """llama.cpp has its own implementation of SentencePiece's BPE, and the same scores."""
    for text, ids in llamacpp_ids("llamacpp_sentencepiece_ids.json").items():
        assert llama_model.encode(text, add_bos=False) == ids, repr(text)


@needs_llama
def test_both_forms_of_llamas_tokenizer_agree(llama_json: Tokenizer, llama_model: Tokenizer) -> None:
    """On every hard string and OA text, except where spaces meet.

    The tokenizer.json there was written by transformers 5, which ranks merges by id instead of by score (runs of
    spaces come out another way) and drops one leading space. SentencePiece, and with it every LLaMA's training, has
    what `llama_model` has; the JSON is followed as it stands, since transformers does.
    """
    texts = list(HARD_STRINGS)
    questions = SHARED / "data/oa_questions.jsonl"
    if questions.is_file():
        for line in questions.read_text(encoding="utf-8").splitlines():
            texts += [json.loads(line)["input"], json.loads(line)["output"]]
    compared = 0
    for text in texts:
        single = re.sub("[ ▁]{2,}", " ", text).lstrip(" ▁")
        assert llama_json.encode(single) == llama_model.encode(single), repr(single[:100])
        if single == text:
            compared += 1
    assert compared > len(texts) // 2


@needs_llama
def test_llama_tokens_bytes(llama_model: Tokenizer) -> None:
    for text in HARD_STRINGS:
        if "▁" in text:  # it is how the vocabulary spells a space
            continue
        ids = llama_model.encode(text, add_bos=False)
        assert b"".join(map(llama_model.token_bytes, ids)) == (b" " if text else b"") + text.encode()
        assert llama_model.decode(ids) == text


@needs_llama
def test_llama_prompt_of_the_paper(llama_json: Tokenizer) -> None:
    """The Guanaco format has no special tokens: BOS once, by the tokenizer's rule, and the text as it is."""
    messages = [{"role": "user", "content": "hi"}]
    ids = llama_json.encode_chat(messages, template=named_template("guanaco"))
    assert ids == llama_json.encode(named_template("guanaco").render(messages))
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert ids[-8:] == LLAMA_IDS["### Human: hi ### Assistant:"][1:]


# --- the demo's vocabulary ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(demo_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(demo_model_dir)


def test_demo_gives_llamacpps_ids(demo: Tokenizer) -> None:
    for text, ids in llamacpp_ids("llamacpp_demo_ids.json").items():
        assert demo.encode(text) == ids, repr(text)


def test_demo_gives_transformers_ids(demo: Tokenizer, demo_model_dir: Path) -> None:
    oracle = as_transformers(demo_model_dir)
    for text in HARD_STRINGS:
        assert demo.encode(text) == oracle.encode(text, split_special_tokens=True), repr(text)
    assert (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id) == (1, 2, 2)


def test_demo_round_trip(demo: Tokenizer) -> None:
    for text in HARD_STRINGS:
        ids = demo.encode(text)
        assert demo.decode(ids) == text
        assert b"".join(map(demo.token_bytes, ids)) == text.encode()


def test_demo_special_tokens(demo: Tokenizer, demo_model_dir: Path) -> None:
    """BOS is named but never added; the token that ends a turn is the one that ends an answer."""
    assert (demo.bos_id, demo.eos_ids, demo.vocab_size) == (1, (2,), 49152)
    assert demo.special_ids == set(range(17))
    assert demo.encode("") == []
    assert demo.encode("", add_bos=True) == [1]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = demo.encode_chat(turns, add_generation_prompt=False)
    assert ids == as_transformers(demo_model_dir).apply_chat_template(turns, return_dict=False)
    assert ids[-2] == 2
    config = json.loads((demo_model_dir / "config.json").read_text())
    generation = json.loads((demo_model_dir / "generation_config.json").read_text())
    special = reconcile_special_ids(
        config["bos_token_id"], config["eos_token_id"], generation["eos_token_id"], demo, 49152
    )
    assert special == SpecialIds(1, (2,), ())
