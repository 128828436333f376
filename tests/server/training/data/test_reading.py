"""Files of training data: every format comes to the same rows, and a row that can't be trained on says why."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from guanaco.server.training.data import reading
from guanaco.server.training.data.reading import DataFile, read_conversations
from guanaco.server.training.data.rows import DataError, Message, RefusalKind, Row

CHAT = (Message("user", "Hi?"), Message("assistant", "Hello.", learned=True))
TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]


def write_lines(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(tmp_path: Path, *rows: Any, **options: Any) -> DataFile:
    return read_conversations(write_lines(tmp_path / "data.jsonl", *rows), **options)


@pytest.mark.parametrize(
    ("format_name", "row"),
    [
        ("messages", {"messages": TURNS}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, TURNS[1]]}),
        ("alpaca", {"instruction": "Hi?", "input": "", "output": "Hello."}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}),
        ("sharegpt", {"conversations": TURNS}),
        ("completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}),
        ("guanaco", {"text": "### Human: Hi?### Assistant: Hello."}),
        ("guanaco", {"text": "### Human: Hi?\n### Assistant: Hello.\n"}),
    ],
)
def test_a_conversation_is_the_same_in_every_format(tmp_path: Path, format_name: str, row: dict[str, Any]) -> None:
    data = read(tmp_path, row)
    assert (data.format, data.rows, data.refusals) == (format_name, [Row(1, messages=CHAT)], [])
    assert read(tmp_path, row, format=format_name).rows == data.rows


def test_system_messages_history_inputs_and_weights(tmp_path: Path) -> None:
    alpaca = {"system": "S", "history": [["a", "b"]], "instruction": "c", "input": "d", "output": "e"}
    (row,) = read(tmp_path, alpaca).rows
    assert [(m.role, m.content, m.learned) for m in row.messages] == [
        ("system", "S", False), ("user", "a", False), ("assistant", "b", True), ("user", "c\n\nd", False),
        ("assistant", "e", True),
    ]  # fmt: skip
    weighted = [{"role": "developer", "content": "S"}, TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]
    (row,) = read(tmp_path, {"messages": weighted}).rows
    assert [m.learned for m in row.messages] == [False, False, False, False, True]
    assert row.messages[0].role == "system"


def test_plain_texts_and_completions_go_without_a_template(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": "2 + 2 =", "completion": " 4"}).rows == [Row(1, prompt="2 + 2 =", text=" 4")]
    assert read(tmp_path, {"text": "Once."}).rows == [Row(1, text="Once.")]
    text = tmp_path / "story.txt"
    text.write_text("\n\nOne\nline.\n\n\nAnother.\n")
    data = read_conversations(text)
    assert (data.format, data.rows) == ("text", [Row(3, text="One\nline."), Row(7, text="Another.")])
    guanaco = {"text": "### Human: Hi?### Assistant: Hello."}
    assert read(tmp_path, guanaco, guanaco_as_text=True).rows == [Row(1, text=guanaco["text"])]


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        (
            RefusalKind.EMPTY_ANSWER,
            {"messages": [TURNS[0], {"role": "assistant", "content": " \n"}]},
            "turn 2 is empty",
        ),
        (RefusalKind.EMPTY_ANSWER, {"prompt": "a", "completion": " "}, "completion is empty"),
        (RefusalKind.ROLES, {"messages": TURNS[::-1]}, "user first"),
        (RefusalKind.ROLES, {"messages": [TURNS[0], TURNS[0], TURNS[1]]}, "must alternate"),
        (
            RefusalKind.ROLES,
            {"messages": [*TURNS, {"role": "system", "content": "S"}, *TURNS]},
            "turn 3 is of the role",
        ),
        (RefusalKind.ROLES, {"messages": TURNS[:1]}, "the last message"),
        (RefusalKind.NOTHING_TO_LEARN, {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "weight 1"),
        (RefusalKind.NOTHING_TO_LEARN, {"messages": []}, "no messages"),
        (RefusalKind.BAD_FIELDS, {"messages": "Hi"}, "must be a list"),
        (RefusalKind.BAD_FIELDS, {"messages": [{"role": "alien", "content": "x"}, TURNS[1]]}, "alien"),
        (RefusalKind.BAD_FIELDS, {"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, "weight"),
        (RefusalKind.BAD_FIELDS, {"conversation_of": "x"}, "messages must be a list"),
        (RefusalKind.UNSUPPORTED, {"messages": TURNS, "tools": [{}]}, "tool calls"),
        (RefusalKind.UNSUPPORTED, {"messages": [{"role": "tool", "content": "x"}]}, "tool calls"),
        (RefusalKind.UNSUPPORTED, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
        (RefusalKind.NOT_JSON, "{oops", "not JSON"),
        (RefusalKind.NOT_JSON, "[1]", "not an object"),
        (RefusalKind.NOT_JSON, '{"messages": [], "messages": []}', "twice"),
    ],
)
def test_a_refusal_has_its_line_and_its_reason(tmp_path: Path, kind: RefusalKind, row: Any, words: str) -> None:
    format_name = "completion" if "completion" in row else "messages"
    good = {"prompt": "a", "completion": "b"} if format_name == "completion" else {"messages": TURNS}
    data = read(tmp_path, good, "", row, good)
    (refusal,) = data.refusals
    assert (refusal.line, refusal.kind) == (3, kind)
    assert words in refusal.reason
    assert str(refusal).startswith("line 3: ")
    assert (data.num_rows, len(data.rows), data.num_refused[kind], data.num_duplicates) == (3, 2, 1, 1)


def test_an_array_a_byte_order_mark_and_duplicates(tmp_path: Path) -> None:
    rows = [{"instruction": "Hi?", "output": "Hello."}] * 3
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    data = read_conversations(path)
    assert ([row.line for row in data.rows], data.num_duplicates) == ([1, 2, 3], 2)
    lines = write_lines(tmp_path / "bom.jsonl", "\ufeff" + json.dumps(rows[0]))
    assert len(read_conversations(lines).rows) == 1


def test_a_file_that_is_none_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_conversations(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        read(tmp_path, "", " ")
    with pytest.raises(DataError, match="no data format is called csv"):
        read(tmp_path, {"messages": TURNS}, format="csv")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"instruction": ')
    with pytest.raises(DataError, match="JSON array"):
        read_conversations(broken)
    assert "instruction and output" in read(tmp_path, {"question": "a"}).refusals[0].reason


@pytest.mark.parametrize("num_bytes", [1, 2, 7, 1000])
def test_an_array_is_the_same_wherever_it_is_cut(
    num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_READ_BYTES", num_bytes)
    path = tmp_path / "data.json"
    path.write_text(
        ' [ {"text": "ä ] , \\" \U0001f600"} ,\n{"text":"b"}, 1234, "x", {"text": "c"}\n] \n', encoding="utf-8-sig"
    )
    data = read_conversations(path)
    assert [(row.line, row.text) for row in data.rows] == [(1, 'ä ] , " \U0001f600'), (2, "b"), (5, "c")]
    assert [refusal.line for refusal in data.refusals] == [3, 4]
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for text in (
        '[{"text": "a"}',
        '[{"text": "a"} {"text": "b"}]',
        '[{"text": "a"}] x',
        "[,]",
        '[{"text": "a"},]',
        "[nan",
    ):
        path.write_text(text)
        with pytest.raises(DataError, match="begins as a JSON array but is not one"):
            read_conversations(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="has no rows"):
        read_conversations(path)


@pytest.mark.parametrize("kind", ["lines", "array", "text"])
def test_counting_the_rows_of_a_large_file_takes_little_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_READ_BYTES", 1 << 14)
    row, number = "word " * 200, 4000
    path = tmp_path / ("data.txt" if kind == "text" else "data.json")
    between = {"lines": "\n", "array": ",", "text": "\n\n"}[kind]
    text = between.join([row if kind == "text" else json.dumps({"text": row})] * number)
    path.write_text(f"[{text}]" if kind == "array" else text)
    del text
    tracemalloc.start()
    try:
        data = read_conversations(path, keeps_rows=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (data.num_good, data.num_rows, data.rows) == (number, number, [])
    assert peak < path.stat().st_size / 10
