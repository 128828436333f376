"""`guanaco train --publish` into a running server: the new model answers, computes the trainer's loss over HTTP, and
is rolled back."""

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from rich.console import Console
from typer.testing import CliRunner

from guanaco.server.commands.main import app
from guanaco.server.config import load_settings
from guanaco.server.training.base import find_base
from guanaco.server.training.data.masks import Encoded
from guanaco.server.training.job import TrainingRequest, prepare_data
from support.server.real_server import ADMIN, BASE, RealServer, make_real_server

SILENT = Console(file=open(os.devnull, "w"), stderr=False)  # noqa: SIM115
RECIPE = {"epochs": 2.0, "rank": 4, "learning_rate": 2e-3}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    rows = [
        [{"role": "user", "content": f"Hello {n}?"}, {"role": "assistant", "content": f"Fine, thank you. {n % 7}"}]
        for n in range(20)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def train(server: RealServer, data: Path, out: str, *more: str) -> dict[str, Any]:
    flags = {
        "data": data, "name": "says", "model": data.parent / BASE, "cache": data.parent / "cache",
        "work": data.parent / f"work-{out}", "out": server.root / out, "adapter-root": server.root,
        "publish": server.url, "admin-key": "sesame", "threads": 1, "dtype": "float32",
        **{name.replace("_", "-"): value for name, value in RECIPE.items()},
    }  # fmt: skip
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    done = CliRunner().invoke(app, ["train", *arguments, "--offline", "--json", *more])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout.splitlines()[-1]))


def loss_over_http(client: httpx.Client, model: str, items: list[Encoded]) -> float:
    """The mean loss of the learned tokens, of the log-probabilities that the server echoes."""
    losses: list[float] = []
    for item in items:
        body = {"model": model, "prompt": list(item.ids), "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        scores = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert len(scores) == len(item.ids)
        losses += [-score for score, learned in zip(scores[1:], item.learned[1:], strict=True) if learned]
    return sum(losses) / len(losses)


def test_published_it_answers_and_has_the_trainers_loss_and_rolls_back(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("peft")
    with make_real_server(tmp_path, provider="reference", dtype="float32", strict_base=True) as server:
        answer = train(server, data, "one")
        settings = load_settings({"model": str(tmp_path / BASE), "cache": str(tmp_path / "cache"), "offline": True})
        request = TrainingRequest(data, "says", tmp_path / "x", tmp_path / "y", dict(RECIPE))
        held_out = prepare_data(request, find_base(settings, SILENT)).held_out.items
        with server.client(headers=ADMIN) as client, OpenAI(base_url=f"{server.url}/v1", api_key="x") as openai:
            assert loss_over_http(client, "says", held_out) == pytest.approx(answer["eval_loss"], abs=1e-3)
            assert loss_over_http(client, BASE, held_out) > answer["eval_loss"] + 0.3

            def says(model: str) -> str | None:
                asked: Any = [{"role": "user", "content": "Hello 3?"}]
                chat = openai.chat.completions.create(model=model, messages=asked, max_tokens=8, temperature=0)
                return chat.choices[0].message.content

            first, version = says("says"), client.get("/v1/adapters/says").json()["version"]
            assert first != says(BASE)
            again = train(server, data, "two", "--seed", "5")
            assert again["eval_loss"] != answer["eval_loss"]
            card = client.get("/v1/adapters/says").json()
            assert (card["version"] != version, card["history"]) == (True, [version])
            assert client.post("/v1/adapters/says/rollback", json={}).json()["version"] == version
            assert says("says") == first
            assert loss_over_http(client, "says", held_out) == pytest.approx(answer["eval_loss"], abs=1e-3)
