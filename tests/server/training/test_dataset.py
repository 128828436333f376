"""From rows to the sequences of a training: what is refused, what is held out, and in which order the rest comes."""

import json
from pathlib import Path

import pytest

from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.training.data.masks import Encoder
from guanaco.server.training.data.reading import read_conversations
from guanaco.server.training.data.rows import DataError, RefusalKind
from guanaco.server.training.dataset import encode_rows, split, summary, training_order
from guanaco.server.training.recipes import recipe_for
from support.models.tiny_tokenizers import write_byte_level


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    tokenizer = Tokenizer.from_directory(write_byte_level(tmp_path_factory.mktemp("tokenizer")))
    return Encoder(tokenizer, eos_ids=tokenizer.eos_ids, max_length=60)


def write(path: Path, answers: list[str]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Q{number}"}, {"role": "assistant", "content": answer}]}
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_long_rows_are_counted_and_faulty_ones_end_it(tmp_path: Path, encoder: Encoder) -> None:
    data = read_conversations(write(tmp_path / "a.jsonl", ["fine", "long " * 60, "fine"]))
    found = encode_rows(data, encoder)
    assert [item.line for item in found.items] == [1, 3]
    assert found.num_refused == {RefusalKind.TOO_LONG: 1}
    assert "1 rows are left out (1 too long): lines 2" in " ".join(summary(data, found))
    with pytest.raises(DataError, match=r"1 row is refused: line 2: the row has \d+ tokens"):
        encode_rows(data, encoder, too_long="refuse")
    faulty = read_conversations(write(tmp_path / "b.jsonl", ["fine", "", "fine", " "]))
    with pytest.raises(DataError, match=r"2 rows are refused: line 2: .*; line 4: .*--skip-refused"):
        encode_rows(faulty, encoder)
    assert [item.line for item in encode_rows(faulty, encoder, skip_refused=True).items] == [1, 3]
    with pytest.raises(DataError, match="no row is left"):
        encode_rows(read_conversations(write(tmp_path / "c.jsonl", ["long " * 60])), encoder)


def test_the_split_is_the_seeds_and_keeps_duplicates(tmp_path: Path, encoder: Encoder) -> None:
    data = read_conversations(write(tmp_path / "a.jsonl", ["same"] * 40))
    items = encode_rows(data, encoder).items
    train, held_out = split(items, 0.1, 200, 0)
    assert (len(train), len(held_out)) == (36, 4)
    assert sorted(item.line for item in (*train, *held_out)) == list(range(1, 41))
    assert split(items, 0.1, 200, 0) == (train, held_out)
    assert split(items, 0.1, 200, 1) != (train, held_out)
    assert len(split(items, 0.5, 3, 0)[1]) == 3
    assert split(items[:9], 0.5, 200, 0)[1] == [], "a small file is trained on whole"


@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_has_every_row_once_in_another_order(grouped: bool) -> None:
    lengths = [(7 * number) % 50 for number in range(90)]
    order = training_order(lengths, 225, 4, 3, grouped=grouped)
    epochs = [order[:90], order[90:180]]
    assert all(sorted(epoch) == list(range(90)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len(order) == 225
    assert order == training_order(lengths, 225, 4, 3, grouped=grouped)
    batches = [[lengths[index] for index in order[start : start + 4]] for start in range(0, 88, 4)]
    padding = sum(4 * max(batch) - sum(batch) for batch in batches)
    assert padding < 150 if grouped else padding > 600


def test_recipes() -> None:
    default = recipe_for("default", 135 * 10**6, {})
    assert (default.rank, default.alpha, default.learning_rate, default.gradient_checkpointing) == (16, 32, 1e-3, False)
    assert recipe_for("default", 7 * 10**9, {}).learning_rate == 2e-4
    assert recipe_for("default", 7 * 10**9, {}).gradient_checkpointing
    assert recipe_for("default", 1, {"rank": 4}).alpha == 8
    assert recipe_for("default", 1, {"batch_size": 3}).micro_batch == 3
    changed = recipe_for("default", 1, {"batch_size": 10, "seed": 7})
    assert (changed.micro_batch, changed.accumulation, changed.data_seed) == (2, 5, 7)
    sizes = {"7B": 7, "13B": 13, "33B": 33, "65B": 65}
    released = {size: recipe_for("guanaco-2023", billions * 10**9, {}) for size, billions in sizes.items()}
    assert [r.learning_rate for r in released.values()] == [2e-4, 2e-4, 1e-4, 1e-4]
    assert [r.dropout for r in released.values()] == [0.1, 0.05, 0.05, 0.05]
    assert [r.save_every for r in released.values()] == [500, 500, 200, 200]
    same = {
        (r.rank, r.alpha, r.batch_size, r.micro_batch, r.steps, r.eval_every, r.max_grad_norm, r.beta2, r.weight_decay)
        for r in released.values()
    }
    assert same == {(64, 16, 16, 1, 1875, 187, 0.3, 0.999, 0.0)}
    seeds = {(r.seed, r.data_seed, r.schedule, r.train_on, r.group_by_length) for r in released.values()}
    assert seeds == {(0, 42, "constant", "all", True)}
    assert recipe_for("guanaco-2023", 1, {"epochs": 2.0}).steps is None
