"""`guanaco compare` with endpoints that are not guanaco: each has a key of its own, and each is careless with it."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guanaco.server.commands.main import app
from support.server.scripted_endpoint import Reply, ScriptedEndpoint, chat_answer, judged

KEYS = {"one": "sk-one-0123456789", "two": 'sk-two-"quoted"-0123', "judge": "sk-judge-0123456789"}
PROMPTS = [{"id": f"q{i}", "text": f"question {i}", "reference": "fine"} for i in range(24)]


class OpenAILike:
    """Chat completions alone: no card of a model, no tokenizer. It repeats the key of a request wherever it can."""

    def __init__(self, name: str) -> None:
        self.name, self.key = name, KEYS[name]

    def answer(self, path: str, body: dict[str, Any]) -> Reply:
        if not path.endswith("/chat/completions"):
            return 404, {}, {"error": {"message": f"Invalid URL, key {self.key}"}}
        if body["messages"][-1]["content"] == "question 3":
            return 400, {}, {"error": {"message": f"content filter; your key is {self.key}"}}
        if self.name == "judge":
            first, _, _ = judged(body)
            return chat_answer(f"Judged with {self.key}.\n" + ("1" if first.startswith("one") else "2"))
        status, _, told = chat_answer(f"{self.name} answers; my key is {self.key}")
        return status, {"X-Adapter-Version": self.key}, told


@pytest.fixture
def servers() -> Iterator[dict[str, ScriptedEndpoint]]:
    one, two, judge = (ScriptedEndpoint(OpenAILike(name).answer) for name in KEYS)
    with one, two, judge:
        yield {"one": one, "two": two, "judge": judge}


def test_each_endpoint_gets_its_own_key_and_nothing_keeps_it(
    servers: dict[str, ScriptedEndpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(map(json.dumps, PROMPTS)))
    arguments = [f"{servers[name].url}#m" for name in ("one", "two")]
    for name, key in KEYS.items():
        monkeypatch.setenv(f"KEY_OF_{name.upper()}", key)
        arguments += ["--key", f"{servers[name].url}=env:KEY_OF_{name.upper()}"]
    arguments += [
        "--judge-url",
        servers["judge"].url,
        "--judge-model",
        "j",
        "--prompts",
        prompts,
        "--out",
        out,
        "--json",
    ]
    with caplog.at_level(logging.INFO):
        done = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    (pair,) = told["benchmarks"]["p"]["pairs"]
    assert (pair["prompts"], pair["wins"], pair["agreement"]) == (23, 23, 1.0)
    assert "my key is (key)" in (out / "answers.jsonl").read_text()
    assert "your key is (key)" in told["checks"]["contestants"][arguments[0]]["errors"][0]
    for name, server in servers.items():
        assert {headers.get("Authorization") for _, headers, _ in server.requests} == {f"Bearer {KEYS[name]}"}
    logs = "\n".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)
    kept = {path.name: path.read_text() for path in out.rglob("*") if path.is_file()}
    assert kept.keys() >= {
        "answers.jsonl",
        "judgements.jsonl",
        "report.json",
        "report.md",
        "report.html",
        "verdicts.csv",
    }
    for key in KEYS.values():
        for where, text in {"output": done.stdout + done.stderr, "log": logs, **kept}.items():
            assert key not in text, where
            assert json.dumps(key)[1:-1] not in text, where
