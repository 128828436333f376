"""Prompts: the user's JSONL, the benchmarks by their hash, turns, samples."""

import json
from pathlib import Path
from typing import Any

import pytest

from guanaco.server.errors import CommandError
from guanaco.server.judging.prompts import BENCHMARKS, hash_of, read_benchmark, read_prompts, sample

_PLACES = [folder / "shared" / "data" for folder in Path(__file__).parents]
DATA = next((place for place in _PLACES if (place / "oa_questions.jsonl").exists()), _PLACES[-1])
released = pytest.mark.skipif(not (DATA / "oa_questions.jsonl").exists(), reason="the released prompts are not here")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_text_and_messages(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    file = write(
        tmp_path / "p.jsonl", {"text": "Hi"}, "", {"id": "x", "messages": talk, "category": "chat", "lang": "de",
                                                  "reference": "d"},
    )  # fmt: skip
    first, second = read_prompts(file)
    assert (first.id, first.messages, first.category, first.language) == ("1", (("user", "Hi"),), "all", None)
    assert second.body() == talk
    assert (second.id, second.category, second.language, second.reference) == ("x", "chat", "de", "d")
    assert "[assistant]\nb" in second.shown


def test_turns_of_the_openassistant_form(tmp_path: Path) -> None:
    text = "### Human: a ### Assistant: b\n\nc ### Human: d ### Assistant:"
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", {"text": text}))
    assert prompt.messages == (("user", "a"), ("assistant", "b\n\nc"), ("user", "d"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], "line 1: not a JSON object"),
        ([{"text": "a"}, {"question": "b"}], "line 2: neither messages nor text"),
        ([{"text": "  "}], "neither messages nor text"),
        ([{"messages": []}], "a list of 1 to 512"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "needs a role"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "the last message must be the user's"),
        ([{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], "line 2: the id '1' is there twice"),
        ([{"text": "a", "category": 7}], "category must be a text"),
        ([""], "no prompts"),
    ],
)
def test_wrong_prompts_are_named_by_their_line(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(CommandError, match=words):
        read_prompts(write(tmp_path / "p.jsonl", *rows))


def test_a_sample_is_chosen_by_its_seed(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "p.jsonl", *({"text": f"q{i}"} for i in range(50))))
    one, same, other = sample(prompts, 9, 1), sample(prompts, 9, 1), sample(prompts, 9, 2)
    assert one == same != other
    assert len(one) == 9
    assert one == sorted(one, key=lambda p: int(p.id))
    assert sample(prompts, 99, 1) == prompts
    assert hash_of(one) != hash_of(other)


def test_a_benchmark_that_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--benchmark-file PATH"):
        read_benchmark("vicuna", None)
    with pytest.raises(CommandError, match="there are vicuna and openassistant"):
        read_benchmark("mtbench", None)
    with pytest.raises(CommandError, match="is not the released file"):
        read_benchmark("vicuna", write(tmp_path / "p.jsonl", {"text": "Hi"}))


@released
def test_the_released_files_are_the_benchmarks() -> None:
    vicuna = read_benchmark("vicuna", DATA / "vicuna_questions.jsonl")
    assert len(vicuna) == BENCHMARKS["vicuna"].count
    assert len({p.category for p in vicuna}) == 9
    openassistant = read_benchmark("openassistant", DATA / "oa_questions.jsonl")
    assert len(openassistant) == BENCHMARKS["openassistant"].count
    turns = [sum(role == "user" for role, _ in p.messages) for p in openassistant]
    assert [turns.count(n) for n in (1, 2, 3)] == [517, 414, 22]
    assert all(p.messages[-1][0] == "user" and p.reference for p in openassistant)
    assert sum(p.language == "es" for p in openassistant) == 282


def test_the_page_names_each_benchmarks_file() -> None:
    page = (Path(__file__).parents[3] / "docs" / "judging.md").read_text()
    for benchmark in BENCHMARKS.values():
        file, _, rest = benchmark.home.partition(" of ")
        repository, _, commit = rest.partition(" at ")
        row = next(line for line in page.splitlines() if line.startswith(f"| `{benchmark.name}` |"))
        assert f"`{file}` of `{repository}` at commit `{commit}`" in row
        assert f"`{benchmark.sha256[:8]}…{benchmark.sha256[-6:]}`" in row
