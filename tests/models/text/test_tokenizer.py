"""Tokenizer: special ids against the configs, raw prompts, ends, and text from ids."""

import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from guanaco.models.errors import ModelError
from guanaco.models.text.special_ids import SpecialIds, missing_rows_note, reconcile_special_ids
from guanaco.models.text.tokenizer import Tokenizer
from support.models.hard_strings import HARD_STRINGS
from support.models.tiny_tokenizers import (
    edit_json,
    write_byte_level,
    write_sentencepiece_like,
)


def test_token_bytes_of_the_tiny_vocabulary(tiny: Tokenizer) -> None:
    for string in HARD_STRINGS:
        assert b"".join(map(tiny.token_bytes, tiny.encode(string))) == string.encode()
    assert tiny.token_bytes(2) == b"<|im_end|>"
    [euro] = [ids for ids in [tiny.encode("€")] if len(ids) == 3]
    assert [tiny.token_bytes(i) for i in euro] == [b"\xe2", b"\x82", b"\xac"]
    assert tiny.token_text(euro[0]) == "�"


def test_decode_with_and_without_control_tokens(tiny: Tokenizer) -> None:
    ids = [1, *tiny.encode("hi"), 2]
    assert tiny.decode(ids) == "hi"
    assert tiny.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


def test_joined_bytes_are_the_librarys_text(tmp_path: Path) -> None:
    """Short texts are joined from the tokens' bytes. The library's decoder, the oracle, gets the same random ids: broken
    characters, control tokens, added tokens whose text is in no or in another spelling."""
    odd = ({"content": "é", "special": False}, {"content": "né x", "special": False}, {"content": "Ġx"})
    path = write_byte_level(tmp_path / "odd", extra=odd)
    tokenizer = Tokenizer.from_directory(path)
    oracle = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    rng = random.Random(7)
    half = [index for index in range(256) if len(tokenizer.token_bytes(index)) == 1] or list(range(256))
    for _ in range(3000):
        ids = [rng.choice(half) if rng.random() < 0.5 else rng.randrange(387) for _ in range(rng.randrange(1, 9))]
        skip = rng.random() < 0.5
        ours = tokenizer.decode([*ids, tokenizer.vocab_size + 5], skip_special_tokens=skip)
        assert ours == oracle.decode(ids, skip_special_tokens=skip), ids
    long = [rng.randrange(387) for _ in range(1000)]
    assert tokenizer.decode(long) == oracle.decode(long)


def test_a_decoder_with_more_than_byte_level_keeps_its_other_parts(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path / "more")
    content = json.loads((path / "tokenizer.json").read_text())
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], strip]}
    (path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.decode(tokenizer.encode(" hi")) == "hi"


# --- bos and eos of the configs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(write_sentencepiece_like(tmp_path_factory.mktemp("names")))


@pytest.mark.parametrize(
    ("bos", "eos", "generation", "expected_eos", "num_notes"),
    [
        (1, 2, None, (2,), 0),
        (1, [2], [2], (2,), 0),
        (None, None, None, (2,), 0),
        (0, 1, 1, (2, 1), 2),  # decapoda: bos 0, eos 1 (in both configs); the model never draws 1
        (0, 1, None, (2, 1), 2),
        (-1, -1, -1, (2,), 0),
        (1, 99999, None, (2,), 1),  # beyond the rows
        (1, 300, None, (2, 300), 1),  # an ordinary piece
        (1, 300, [2, 301], (2, 300, 301), 2),
        (1, [2, 0], None, (2, 0), 1),
    ],
)
def test_llama_ids_against_the_configs(
    bos: int | None, eos: Any, generation: Any, expected_eos: tuple[int, ...], num_notes: int, llama_like: Tokenizer
) -> None:
    special = reconcile_special_ids(bos, eos, generation, llama_like, 384)
    assert (special.bos_id, special.eos_ids) == (1, expected_eos)
    assert len(special.notes) == num_notes
    if num_notes:
        assert all("config.json says" in note for note in special.notes)


def test_several_eos_ids_are_joined(tiny: Tokenizer) -> None:
    """LLaMA 3: the tokenizer names one, the configs name the others."""
    eot = next(i for i in tiny.special_ids if tiny.token_text(i) == "<|eot_id|>")
    special = reconcile_special_ids(1, [0, eot], [2, eot], tiny, 400)
    assert special.eos_ids == (2, 0, eot)  # 0 is also the unknown token here, and the config says that it ends
    assert len(special.notes) == 1


def test_a_tokenizer_that_names_nothing_believes_the_config(files: Path) -> None:
    edit_json(
        files, "tokenizer_config.json", lambda c: [c.pop(name) for name in ("bos_token", "eos_token", "unk_token")]
    )
    tokenizer = Tokenizer.from_directory(files)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (0,))  # <|endoftext|>
    assert reconcile_special_ids(1, 2, None, tokenizer, 384) == SpecialIds(1, (0, 2), ())


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_other_threads_run_while_a_long_text_is_tokenised(demo_model_dir: Path, work: str) -> None:
    """With a switch interval of minutes another thread only runs where the tokenizer gives the interpreter up."""
    tokenizer = Tokenizer.from_directory(demo_model_dir)
    ids = tokenizer.encode("hello, world " * 2000)
    counts, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counts[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count, daemon=True)
    sys.setswitchinterval(1000)
    try:
        thread.start()
        before = counts[0]
        for _ in range(200):  # it may be waiting for a processor
            if work == "encode":
                tokenizer.encode("hello, world " * 2000)
            else:
                tokenizer.decode(ids)
            if (after := counts[0]) > before:
                break
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert after > before


def test_every_end_that_generate_heeds_ends_here_too(files: Path, tmp_path: Path) -> None:
    """The oracle: transformers' generate on the same directory, with ends that the tokenizer calls something else."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    from support.models.tiny_models import make_tiny_llama

    path = make_tiny_llama(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    free = model.generate(prompt, generation_config=GenerationConfig(**options))[0, 3:].tolist()
    end = next(token for token in free[2:] if free.index(token) >= 2)  # an ordinary piece
    tokenizer = Tokenizer.from_directory(files)
    for ends in ([end], [tokenizer.bos_id, end], [2, tokenizer.bos_id]):
        found = model.generate(prompt, generation_config=GenerationConfig(**options, eos_token_id=ends))[0, 3:].tolist()
        ours = reconcile_special_ids(tokenizer.bos_id, None, ends, tokenizer, model.config.vocab_size).eos_ids
        assert set(ends) <= set(ours)
        stops = [index for index, token in enumerate(free) if token in ours]
        assert found == (free[: stops[0] + 1] if stops else free)


def test_a_generation_config_with_something_else_than_ids_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(ModelError, match="eos_token_id must be a token id"):
        reconcile_special_ids(1, 2, ["<|eot_id|>"], tiny, 384)


def test_ids_beyond_the_embedding_rows_are_told(tiny: Tokenizer) -> None:
    assert missing_rows_note(tiny, tiny.vocab_size) == ()
    (note,) = missing_rows_note(tiny, tiny.vocab_size - 1)
    assert "1 tokens more" in note
    assert tiny.token_text(tiny.vocab_size - 1) in note


def test_raw_prompts_have_control_tokens_and_one_bos(tiny: Tokenizer) -> None:
    eot = next(i for i in tiny.special_ids if tiny.token_text(i) == "<|eot_id|>")
    bos = tiny.token_text(tiny.bos_id)
    plain = tiny.encode("hi<|eot_id|>", add_bos=False)
    assert eot not in plain
    assert tiny.encode("hi<|eot_id|>", add_bos=False, parse_control=True) == [*tiny.encode("hi", add_bos=False), eot]
    assert tiny.encode(f"{bos}hi", add_bos=True, parse_control=True) == tiny.encode("hi", add_bos=True)
    assert tiny.control_id("<|eot_id|>") == eot
    assert (tiny.control_id("eot"), tiny.holds_control("a<|eot_id|>b"), tiny.holds_control("ab")) == (None, True, False)


@pytest.mark.parametrize("text", [*HARD_STRINGS, "<|eot_id|>", "a<|eot_id|> b<|eot_id|>", "<|eot_id|>\n\n<|eot_id|>x"])
def test_raw_prompts_are_transformers_ids(files: Path, text: str) -> None:
    from transformers import AutoTokenizer

    clean = text.encode("utf-8", "replace").decode()
    oracle = AutoTokenizer.from_pretrained(files)
    ours = Tokenizer.from_directory(files).encode(clean, add_bos=False, parse_control=True)
    assert ours == oracle.encode(clean, add_special_tokens=False)


def test_bos_and_eos_beyond_the_rows_are_told(tiny: Tokenizer) -> None:
    special = reconcile_special_ids(None, None, None, tiny, 1)
    assert special.eos_ids == ()
    assert any("texts that begin with it are refused" in note for note in special.notes)
    assert any("the tokenizer says eos 2" in note for note in special.notes)


def test_ids_of_rows_that_only_pad_the_embeddings_are_no_text(tiny: Tokenizer) -> None:
    """A model may draw them; the stand-ins of control tokens have such ids in the backend, and nobody sees those."""
    for index in range(tiny.vocab_size, tiny.vocab_size + 2 * len(tiny.special_ids)):
        assert (tiny.decode([index], skip_special_tokens=False), tiny.token_bytes(index)) == ("", b"")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", ["a</s>b", "</s> the", "the</s>", "<s>[INST] hello [/INST] the </s><s> x", "</s></s>"])
def test_raw_sentencepiece_prompts_are_transformers_ids(legacy: bool, text: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write_sentencepiece_like(tmp_path, legacy=legacy)
    oracle = AutoTokenizer.from_pretrained(path)
    ours = Tokenizer.from_directory(path).encode(text, add_bos=False, parse_control=True)
    assert ours == oracle.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("shape", [lambda index: index, lambda index: [2, index]])
def test_nobody_can_type_an_end_that_only_a_config_names(name: str, shape: Any, tmp_path: Path) -> None:
    path = write_byte_level(tmp_path, extra=({"content": "<end_of_turn>", "special": False},))
    assert 384 in Tokenizer.from_directory(path).encode("<end_of_turn>")  # an added token that is no control token
    (path / name).write_text(json.dumps({"eos_token_id": shape(384)}))
    tokenizer = Tokenizer.from_directory(path)
    assert 384 not in tokenizer.encode("<end_of_turn>")
    assert tokenizer.encode("<end_of_turn>", add_bos=False, parse_control=True) == [384]
    assert tokenizer.decode([384]) == ""


def test_a_rule_that_ends_every_text_is_told(files: Path, tiny: Tokenizer) -> None:
    def told(tokenizer: Tokenizer) -> bool:
        return any("put eos behind every text" in note for note in tokenizer.notes)

    assert not told(tiny)
    edit_json(files, "tokenizer_config.json", lambda c: c.update(add_eos_token=True))
    tokenizer = Tokenizer.from_directory(files)
    assert told(tokenizer)
    assert tokenizer.encode("hello")[-1] != tokenizer.eos_ids[0]
    edit_json(files, "tokenizer_config.json", lambda c: c.pop("add_eos_token"))
    backend = tokenizers.Tokenizer.from_file(str(files / "tokenizer.json"))
    eos = tiny.token_text(2)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, 2)])
    backend.save(str(files / "tokenizer.json"))
    assert told(Tokenizer.from_directory(files))
